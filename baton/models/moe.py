"""A mixture of experts in place of an MLP: each token goes through the few experts its router likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.models.layers import Activation, Linear
from baton.models.parts import Parts
from baton.models.sublayers import GatedMlp


@dataclass(frozen=True)
class SparseMlp:
    """Sum over the `chosen` likeliest experts of router probability * expert(x).

    `renormalize` makes the chosen probabilities add up to 1. Experts add to a token's sum in the order
    of their numbers, so it does not depend on the token's batch mates.
    """

    router: Linear
    experts: Sequence[GatedMlp]
    chosen: int
    renormalize: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        likely = torch.softmax(self.router(x).float(), dim=-1)
        weights, numbers = likely.topk(self.chosen, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        # Stable, so that a token's rows keep their place within each expert's.
        by_expert = numbers.flatten().argsort(stable=True)
        counts = numbers.flatten().bincount(minlength=len(self.experts)).tolist()
        tokens, weights = by_expert // self.chosen, weights.flatten()[by_expert]
        out = torch.zeros_like(x)
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count == 0:
                continue
            rows = tokens[start : start + count]
            mixed = expert(x[rows]) * weights[start : start + count, None]
            out.index_add_(0, rows, mixed.to(x.dtype))
            start += count
        return out


def sparse_mlp(
    parts: Parts,
    prefix: str,
    activation: Activation,
    *,
    experts: int,
    chosen: int,
    inner: int,
    renormalize: bool,
    names: tuple[str, str, str],
) -> SparseMlp:
    """The router `{prefix}.gate` and its experts, `inner` wide each.

    Experts are read one by one as `{prefix}.experts.{number}.{name}`, `names` being those of gate, up
    and down, or all at once from `{prefix}.experts.gate_up_proj` and `.down_proj`.
    """
    router = parts.linear([f"{prefix}.gate"], (experts,), parts.hidden)
    build = _fused if f"{prefix}.experts.gate_up_proj" in parts.weights else _separate
    return SparseMlp(router, build(parts, prefix, activation, experts, inner, names), chosen, renormalize)


def _separate(
    parts: Parts, prefix: str, activation: Activation, experts: int, inner: int, names: tuple[str, str, str]
) -> list[GatedMlp]:
    return [
        parts.gated_mlp(f"{prefix}.experts.{number}", activation, inner, names) for number in range(experts)
    ]


def _fused(
    parts: Parts, prefix: str, activation: Activation, experts: int, inner: int, names: tuple[str, str, str]
) -> list[GatedMlp]:
    kept, halves = parts.inner(inner), parts.gate_up_outputs(inner)

    def shard_of(gate_up: torch.Tensor) -> torch.Tensor:
        if parts.shard.is_whole:
            return gate_up
        return torch.cat([gate_up[:, half.start : half.stop] for half in halves], dim=1)

    gate_up = parts.weights.take(
        f"{prefix}.experts.gate_up_proj", experts, 2 * inner, parts.hidden, part=shard_of
    )
    down = parts.weights.take(
        f"{prefix}.experts.down_proj",
        *(experts, parts.hidden, inner),
        part=lambda down: down[:, :, kept.start : kept.stop],
    )
    return [
        GatedMlp(gate_up=Linear(gate_up[number]), down=Linear(down[number]), activation=activation)
        for number in range(experts)
    ]
