"""One model on several GPUs: the reference's tokens, and KV read between workers on one and on two."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from batch_driver import Driver
from reference_models import VOCAB, Variant, variant, write_reference

from baton.attention.select import preferred_block_size
from baton.kv.hashing import KvLayout
from baton.models.loader import load_model
from baton.models.spread import added_up
from baton.transfer import create_transfer
from baton.transfer.spread import SpreadTransfer

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"not run here: needs two GPUs, found {torch.cuda.device_count()}"
)
FORMAT = "layer,kv,token,head,dim"


def wide(name: str) -> Variant:
    """With heads as wide as FlashInfer takes them."""
    chosen = variant(name)
    return Variant(name, chosen.config, {**chosen.changes, "head_dim": 64})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_bfloat16_is_as_close_to_float32_as_the_references_bfloat16(name: str, tmp_path: Path) -> None:
    reference = write_reference(wide(name), tmp_path).to("cuda")
    tokens = [random.Random(3).randrange(VOCAB) for _ in range(700)]
    batch = torch.tensor([tokens], device="cuda")
    with torch.no_grad():
        exact = reference(batch).logits[0].log_softmax(-1)
        theirs = reference.bfloat16()(batch).logits[0].float().log_softmax(-1)
    model = load_model(tmp_path, "cuda:0", "bfloat16", tensor_parallel=2)
    assert [shard.device.index for shard in model.shards] == [0, 1]
    size = preferred_block_size(model.device, model.dtype, model.attention_specs)
    ours = Driver(model, blocks=6400 // size, block_size=size).logits(tokens).log_softmax(-1)
    assert float((ours - exact).abs().mean()) < 1.5 * float((theirs - exact).abs().mean())


def test_sums_are_the_same_on_every_gpu() -> None:
    parts = [torch.full((3, 5), float(number + 1), device=f"cuda:{number}") for number in range(2)]
    sums = added_up(parts)
    assert [total.device.index for total in sums] == [0, 1]
    assert all(torch.equal(total.cpu(), torch.full((3, 5), 3.0)) for total in sums)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 2), (2, 1), (2, 2)])
async def test_blocks_travel_between_one_gpu_and_two(theirs: int, ours: int) -> None:
    whole = torch.randn(64, 3, 2, 16, 4, 64).bfloat16()
    layout = KvLayout("test", "bfloat16", 16, whole[0].nbytes, FORMAT)

    def worker(name: str, count: int, pool: torch.Tensor) -> tuple[SpreadTransfer, list[torch.Tensor]]:
        pools = [part.to(f"cuda:{at}").contiguous() for at, part in enumerate(pool.chunk(count, dim=4))]
        return SpreadTransfer(partial(create_transfer, "nixl"), pools, layout, name, "1"), pools

    source, _ = worker("p", theirs, whole)
    reader, pools = worker("d", ours, torch.zeros_like(whole))
    try:
        await reader.add_peer(source.describe())
        await reader.warm_up("p/1", 60.0)
        await reader.read("p/1", range(40), range(10, 50), 60.0)
        arrived = torch.cat([pool.cpu() for pool in pools], dim=4)
        assert torch.equal(arrived[10:50], whole[:40])
        assert not arrived[:10].any()
    finally:
        reader.close()
        source.close()
