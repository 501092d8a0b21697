"""What a decoder layer is: attention and an MLP, each between norms and added to what came in."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch

from baton.attention.base import AttentionBackend, AttentionSpec
from baton.models.layers import Activation, Linear, added, added_and_normed, gated
from baton.models.rope import Rotary, rotate

Norm = Callable[[torch.Tensor], torch.Tensor]
Turn = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SelfAttention:
    """Queries, keys and values of one projection, rotary embedding, paged attention, projection back.

    `qkv` yields heads in the order queries, keys, values. `query_norm` and `key_norm`, where a family
    has them, act on each head before it turns.
    """

    spec: AttentionSpec
    rotary: Rotary
    qkv: Linear
    out: Linear
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    def __call__(self, x: torch.Tensor, turn: Turn, attention: AttentionBackend, layer: int) -> torch.Tensor:
        heads, kv_heads = self.spec.heads, self.spec.kv_heads
        qkv = self.qkv(x).view(x.shape[0], heads + 2 * kv_heads, self.spec.head_dim)
        v = qkv[:, heads + kv_heads :]
        if self.query_norm is not None and self.key_norm is not None:
            q = rotate(self.query_norm(qkv[:, :heads]), turn)
            k = rotate(self.key_norm(qkv[:, heads : heads + kv_heads]), turn)
        else:
            turned = rotate(qkv[:, : heads + kv_heads], turn)
            q, k = turned[:, :heads], turned[:, heads:]
        return self.out(attention.attend(layer, q, k, v))


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)); `gate_up` yields gate and up side by side."""

    gate_up: Linear
    down: Linear
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gated(self.activation, self.gate_up(x)))


@dataclass(frozen=True)
class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma also norms what each part returns."""

    attention_norm: Norm
    attention: SelfAttention
    mlp_norm: Norm
    mlp: Callable[[torch.Tensor], torch.Tensor]
    after_attention_norm: Norm | None = None
    after_mlp_norm: Norm | None = None

    def __call__(self, x: torch.Tensor, turn: Turn, attention: AttentionBackend, layer: int) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x), turn, attention, layer)
        x, normed = self._add_attended(x, attended)
        return self._add_mixed(x, self.mlp(normed))

    def spread(
        self, x: torch.Tensor, turn: Turn, attention: AttentionBackend, layer: int
    ) -> Generator[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As a call, for a shard of the layer: yields what is to be added up over all shards, and goes on
        with the sum."""
        attended = yield self.attention(self.attention_norm(x), turn, attention, layer)
        x, normed = self._add_attended(x, attended)
        mixed = yield self.mlp(normed)
        return self._add_mixed(x, mixed)

    def _add_attended(self, x: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and what the MLP takes of it."""
        if self.after_attention_norm is not None:
            attended = self.after_attention_norm(attended)
        return added_and_normed(x, attended, self.mlp_norm)

    def _add_mixed(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        if self.after_mlp_norm is not None:
            mixed = self.after_mlp_norm(mixed)
        return added(x, mixed)
