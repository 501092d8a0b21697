"""One model on several devices of one process: each computes its shard, and they add up what they have.

What a shard does is written in `Decoder.spread` and `Layer.spread`: they run up to where a sum over all
shards is needed and go on with it. This file runs them side by side and adds.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch.cuda import nccl

from baton.attention.base import Attention
from baton.attention.sharded import ShardedAttention
from baton.device import device_of
from baton.models.base import Model
from baton.models.decoder import Decoder


class SpreadModel(Model):
    """A `Model` in shards, each on its device; tokens come and logits go by way of the first."""

    def __init__(self, shards: Sequence[Decoder]) -> None:
        first = shards[0]
        self.config, self.device, self.dtype = first.config, first.device, first.dtype
        self.attention_specs, self.fingerprint = first.attention_specs, first.fingerprint
        self._shards = tuple(shards)
        self._devices = [device_of(shard.device) for shard in shards]

    @property
    def shards(self) -> Sequence[Model]:
        return self._shards

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        assert isinstance(attention, ShardedAttention)
        running = [
            shard.spread(_on(shard, token_ids), _on(shard, positions), backend)
            for shard, backend in zip(self._shards, attention.shards, strict=True)
        ]
        totals: Sequence[torch.Tensor | None] = [None] * len(running)
        while True:
            parts, ended = [], False
            for step, device, total in zip(running, self._devices, totals, strict=True):
                with device.current():
                    part, ended = _go_on(step, total)
                parts.append(part)
            if ended:
                return parts[0]
            totals = added_up(parts)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        parts = []
        for shard, device in zip(self._shards, self._devices, strict=True):
            with device.current():
                parts.append(shard.logits(_on(shard, hidden)))
        return torch.cat([part.to(self.device, non_blocking=True) for part in parts], dim=-1)


def added_up(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sum of `parts` on each of their devices, each in memory of its own, perhaps that of the part.

    Where NCCL does not compute it, parts are added in their order: every device has the same bits.
    """
    if parts[0].is_cuda and nccl.is_available(parts):  # type: ignore[no-untyped-call]
        nccl.all_reduce(parts)  # type: ignore[no-untyped-call]
        return list(parts)
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return [total.to(part.device, copy=True) for part in parts]


def _go_on(
    step: Generator[torch.Tensor, torch.Tensor, torch.Tensor], total: torch.Tensor | None
) -> tuple[torch.Tensor, bool]:
    """What a shard has when it needs the next sum, or at its end; and whether it is at its end."""
    try:
        return next(step) if total is None else step.send(total), False
    except StopIteration as end:
        hidden: torch.Tensor = end.value
        return hidden, True


def _on(shard: Model, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(shard.device, non_blocking=True)
