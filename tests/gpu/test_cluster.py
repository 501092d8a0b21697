"""Prefill and decode workers on one GPU, KV read over NIXL from one's memory into the other's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from reference_models import VOCAB, variant, write_reference

from baton.kv.hashing import KvLayout
from baton.transfer import create_transfer
from tests.conftest import StartCluster
from tests.integration.test_exact import NEW_TOKENS, Answer, Served

LENGTHS = (1, 17, 100, 255, 256, 257, 600)


def serve(start_cluster: StartCluster, folder: Path, *flags: str) -> Iterator[Served]:
    """One prefill and one decode worker, each with a small share of GPU 0."""
    chosen = variant("llama")
    wide = type(chosen)(chosen.name, chosen.config, {**chosen.changes, "head_dim": 64})
    reference = write_reference(wide, folder).to("cuda").eval()
    with start_cluster(
        *("--device", "cuda", "--kv-blocks", "200", "--max-batch-requests", "8"),
        *("--served-model-name", "served", "--max-batch-tokens", "128", "--policy", "round-robin"),
        *("--start-timeout-s", "300"),
        *flags,
        model=folder,
    ) as cluster:
        yield Served(reference, cluster)


def prompts() -> list[list[int]]:
    draw = random.Random(4)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]


def logits_after(served: Served, prompt: Sequence[int], answer: Answer) -> torch.Tensor:
    """The reference's, float32 [NEW_TOKENS, vocab], of every position that the answer filled."""
    context = torch.tensor([[*prompt, *answer.token_ids]], device="cuda")
    with torch.inference_mode():
        return served.reference(context).logits[0, -NEW_TOKENS - 1 : -1].float()


def test_float32_answers_are_the_references(start_cluster: StartCluster, tmp_path: Path) -> None:
    for served in serve(start_cluster, tmp_path, "--dtype", "float32"):
        asked = prompts()
        for prompt, answer in zip(asked, served.ask(asked), strict=True):
            assert answer.prefill == "remote"
            assert answer.token_ids == logits_after(served, prompt, answer).argmax(-1).tolist()


@pytest.mark.parametrize("flags", [(), ("--overlap", "off", "--no-cuda-graphs")], ids=["fast", "plain"])
def test_bfloat16_answers_are_the_references_but_for_rounding(
    start_cluster: StartCluster, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    for served in serve(start_cluster, tmp_path, "--dtype", "bfloat16", *flags):
        asked = prompts()
        for _ in range(2):  # the second time from cached prefixes
            for prompt, answer in zip(asked, served.ask(asked), strict=True):
                assert answer.prefill == "remote"
                logits = logits_after(served, prompt, answer)
                chosen = logits.gather(1, torch.tensor(answer.token_ids, device="cuda")[:, None])[:, 0]
                assert float((logits.amax(-1) - chosen).max()) < 0.1 * float(logits.abs().max())


def test_a_pool_on_the_gpu_is_registered_as_such() -> None:
    storage = torch.zeros(8, 2048, dtype=torch.bfloat16, device="cuda")
    transfer = create_transfer("nixl", storage, KvLayout("test", "bfloat16", 256, 4096, ""), "worker", "1")
    try:
        description = transfer.describe()
        assert (description.memory_type, description.device_id) == ("VRAM", storage.get_device())
        assert description.pool_address == storage.data_ptr()
    finally:
        transfer.close()
