"""The same logits and seeds yield the same tokens on the GPU as on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as TokenIds

import torch

from baton.device import device_of
from baton.engine.sampler import Sampled, Sampler
from baton.engine.sequence import Sequence
from baton.sampling import Sampling

VOCAB = 32_000
SAMPLINGS = [
    Sampling(max_tokens=9, temperature=0.0, logprobs=4),
    Sampling(max_tokens=9),
    Sampling(max_tokens=9, temperature=0.6, top_p=0.9, logprobs=0),
    Sampling(max_tokens=9, top_k=50, min_p=0.01),
    Sampling(max_tokens=9, temperature=1.8, top_k=VOCAB - 1, top_p=0.99),
    Sampling(max_tokens=9, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={5: 9.0}),
    Sampling(max_tokens=9, min_tokens=5, stop_token_ids=(7, 8)),
]


def choices(count: int) -> list[Sequence]:
    return [
        Sequence(
            key=seed,
            request_id="",
            tokens=[1, 2, 3, seed % VOCAB],
            prompt_len=2,
            sampling=Sampling(**{**vars(SAMPLINGS[seed % len(SAMPLINGS)]), "seed": seed}),
            root=bytes(16),
            block_size=16,
        )
        for seed in range(count)
    ]


def sample(logits: torch.Tensor, asking: list[Sequence] | None = None) -> list[Sampled]:
    device = device_of(logits.device)
    rows = Sampler([2], device).sample(logits.clone(), asking or choices(logits.shape[0]))
    return rows.read(device.download(rows.tensors).wait())


def test_tokens_are_the_cpus() -> None:
    logits = (torch.randn(700, VOCAB, generator=torch.Generator().manual_seed(0)) * 3).bfloat16().float()
    here, there = sample(logits), sample(logits.to("cuda"))
    assert [one.token_id for one in there] == [one.token_id for one in here]
    for ours, theirs in zip(here, there, strict=True):
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        if ours.logprobs is not None and theirs.logprobs is not None:
            assert abs(ours.logprobs.chosen.logprob - theirs.logprobs.chosen.logprob) < 1e-4
            assert ours.logprobs.chosen.rank == theirs.logprobs.chosen.rank


class EveryThird:
    """Allows every third token."""

    failure = ""

    def complete(self, tokens: TokenIds[int]) -> bool:
        return False

    def fill(self, tokens: TokenIds[int], address: int, size: int) -> None:
        bits = bytearray(size)
        for token in range(0, VOCAB, 3):
            bits[token // 8] |= 1 << token % 8
        ctypes.memmove(address, bytes(bits), size)


def test_guided_rows_are_the_cpus_too() -> None:
    logits = torch.randn(35, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    on_both = []
    for device in ("cpu", "cuda"):
        asking = choices(35)
        for choice in asking[::2]:
            choice.guide = EveryThird()
        on_both.append([one.token_id for one in sample(logits.to(device), asking)])
    assert on_both[0] == on_both[1]
    assert all(token % 3 == 0 for token in on_both[0][::2])
    assert any(token % 3 for token in on_both[0][1::2])


def test_nothing_waits_for_the_device() -> None:
    logits, asking = torch.randn(35, VOCAB, device="cuda"), choices(35)
    asking[3].guide = EveryThird()
    sampler, device = Sampler([2], device_of(logits.device)), device_of(logits.device)
    sampler.sample(logits, asking)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        download = device.download(sampler.sample(logits, asking).tensors)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len(download.wait()[0]) == 35
