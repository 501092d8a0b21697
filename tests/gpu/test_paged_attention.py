"""Paged attention agrees with plain attention in float32, whatever the backend, the pages and the batch."""

from __future__ import annotations

import random

import pytest
import torch

from baton.attention import flash, flashinfer
from baton.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from baton.attention.select import create_backend, preferred_block_size
from baton.config import AttentionName, BadSetting

DEVICE = torch.device("cuda")
# Steps of new tokens per sequence: prompts of many pages, chunks, decode, and all at once.
STEPS = ((1, 15, 300, 900), (1, 1, 5, 1), (3, 200, 1, 256), (1, 1, 1, 1), (255, 1, 513, 2))
# bfloat16 keeps 8 bits: values around 1 are off by up to 2**-8 when stored, and outputs are means of them.
ROUNDING = 2e-2
SPECS = [
    AttentionSpec(8, 8, 64, 0.125),
    AttentionSpec(8, 2, 128, 0.09),
    AttentionSpec(4, 1, 256, 0.0625),
    AttentionSpec(14, 2, 64, 0.11, window=100),
    AttentionSpec(4, 2, 128, 0.1, window=1),
]
ONLY_FLASH = [AttentionSpec(6, 2, 80, 0.11, window=100), AttentionSpec(4, 4, 16, 0.25, window=1000)]
ONLY_FLASHINFER = [AttentionSpec(4, 2, 128, 0.1, softcap=5.0)]
# FlashInfer may be missing, and in older versions of torch a kernel that reads pages.
USABLE = {
    "flashinfer": flashinfer.supports(DEVICE, torch.bfloat16, SPECS),
    "flash": flash.supports(DEVICE, torch.bfloat16, SPECS),
    "tiled": True,
}
CASES = [
    *(("flash", spec) for spec in (*SPECS, *ONLY_FLASH) if USABLE["flash"]),
    *(("flashinfer", spec) for spec in (*SPECS, *ONLY_FLASHINFER) if USABLE["flashinfer"]),
]


def make(
    device: torch.device, dtype: torch.dtype, specs: list[AttentionSpec], wanted: AttentionName
) -> AttentionBackend:
    size = preferred_block_size(device, dtype, specs, wanted)
    return create_backend(device, dtype, specs, 4 * 2048 // size, size, "test", wanted)


def tables(backend: AttentionBackend) -> list[list[int]]:
    """A block table of 2048 tokens for each of four sequences, in random order."""
    blocks = list(range(backend.cache.total_blocks))
    random.Random(0).shuffle(blocks)
    per_sequence = len(blocks) // 4
    return [blocks[start : start + per_sequence] for start in range(0, len(blocks), per_sequence)]


@pytest.mark.parametrize(("name", "spec"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_paged_agrees_with_plain_attention(
    name: AttentionName, spec: AttentionSpec, dtype: torch.dtype
) -> None:
    specs = [spec, spec]
    paged, plain = make(DEVICE, dtype, specs, name), make(torch.device("cpu"), torch.float32, specs, "tiled")
    paged_tables, plain_tables = tables(paged), tables(plain)
    fixed = paged.fixed_rows(6, 2048)
    assert fixed is not None
    generator = torch.Generator().manual_seed(0)
    contexts = [0, 0, 0, 0]
    for step in STEPS:
        contexts = [context + new for context, new in zip(contexts, step, strict=True)]
        batch = AttentionBatch(step, contexts, paged_tables)
        rows = sum(step)
        if rows == len(step):  # decode: described as for a graph, with two rows left over
            fixed.begin(batch)
            rows += 2
        else:
            paged.begin(batch)
        plain.begin(AttentionBatch(step, contexts, plain_tables))
        for layer in range(len(specs)):
            heads = spec.heads + 2 * spec.kv_heads
            qkv = torch.randn(rows, heads, spec.head_dim, generator=generator).to(dtype)
            q, k, v = qkv.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
            expected = plain.attend(layer, *(part[: sum(step)].float() for part in (q, k, v)))
            actual = paged.attend(layer, *qkv.to(DEVICE).split([spec.heads, spec.kv_heads, spec.kv_heads], 1))
            assert float((actual[: sum(step)].cpu().float() - expected).abs().max()) < ROUNDING


@pytest.mark.parametrize("name", ["flash" if USABLE["flash"] else "tiled"])
def test_a_decoded_token_does_not_depend_on_its_batch_mates(name: AttentionName) -> None:
    spec = AttentionSpec(8, 2, 128, 0.09)
    backend = make(DEVICE, torch.bfloat16, [spec], name)
    qkv = torch.randn(4 * 700, 12, 128, device=DEVICE, dtype=torch.bfloat16).split([8, 2, 2], dim=1)
    backend.begin(AttentionBatch([700] * 4, [700] * 4, tables(backend)))
    backend.attend(0, *qkv)
    last = [part[:4] for part in qkv]
    backend.begin(AttentionBatch([1] * 4, [701] * 4, tables(backend)))
    together = backend.attend(0, *last)
    backend.begin(AttentionBatch([1], [701], tables(backend)[2:3]))
    assert torch.equal(backend.attend(0, *(part[2:3] for part in last))[0], together[2])


def test_what_the_fast_kernels_cannot_do_is_done_plainly() -> None:
    plain = [AttentionSpec(4, 2, 64, 0.125)]
    capped = [AttentionSpec(4, 2, 80, 0.125, softcap=50.0)]
    fastest = next(name for name, usable in USABLE.items() if usable)
    assert make(DEVICE, torch.bfloat16, plain, "auto").name == fastest
    assert make(DEVICE, torch.bfloat16, capped, "auto").name == "tiled"
    assert make(DEVICE, torch.float32, plain, "auto").name == "tiled"
    with pytest.raises(BadSetting, match="--attention flash cannot serve this model"):
        make(DEVICE, torch.bfloat16, capped, "flash")
