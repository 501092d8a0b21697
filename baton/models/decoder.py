"""The decoder every family shares: embed, a stack of attention + MLP layers, norm, project to the vocabulary.

A family file decides what each part is; this file only runs them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from baton.attention.base import AttentionBackend, AttentionSpec
from baton.models.base import Model
from baton.models.config import ModelConfig
from baton.models.layers import Activation, Linear, gated
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
        if self.after_attention_norm is not None:
            attended = self.after_attention_norm(attended)
        x = x + attended
        mixed = self.mlp(self.mlp_norm(x))
        if self.after_mlp_norm is not None:
            mixed = self.after_mlp_norm(mixed)
        return x + mixed


class Decoder(Model):
    """A `Model` made of `Layer`s.

    `embedding` is [vocab, hidden], its rows multiplied by `embedding_scale`; `head` maps hidden to the
    vocabulary; `logits_softcap` c means c * tanh(logits / c).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: torch.Tensor,
        layers: Sequence[Layer],
        norm: Norm,
        head: Linear,
        fingerprint: str,
        embedding_scale: float | None = None,
        logits_softcap: float | None = None,
    ) -> None:
        self.config = config
        self.device, self.dtype = embedding.device, embedding.dtype
        self.attention_specs = tuple(layer.attention.spec for layer in layers)
        self.fingerprint = fingerprint
        self._embedding, self._layers, self._norm, self._head = embedding, tuple(layers), norm, head
        # Rounded to the model's dtype first, as it was in training.
        self._scale = None if embedding_scale is None else torch.tensor(embedding_scale).to(embedding)
        self._softcap = logits_softcap

    @torch.inference_mode()
    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        x = F.embedding(token_ids, self._embedding)
        if self._scale is not None:
            x = x * self._scale
        turns: dict[Rotary, Turn] = {}
        for number, layer in enumerate(self._layers):
            rotary = layer.attention.rotary
            if rotary not in turns:
                turns[rotary] = rotary.at(positions)
            x = layer(x, turns[rotary], attention, number)
        return self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._head(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()
