"""The decoder every family shares: embed, a stack of attention + MLP layers, norm, project to the vocabulary.

A family file decides what each part is; this file only runs them in order.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F

from baton.attention.base import Attention, AttentionBackend
from baton.models.base import Model
from baton.models.config import ModelConfig
from baton.models.layers import Linear
from baton.models.stack import Stack
from baton.models.sublayers import Layer, Norm


class Decoder(Model):
    """A `Model` made of `Layer`s, or one shard of it.

    `embedding` is [vocab, hidden], its rows multiplied by `embedding_scale`; `head` maps hidden to the
    vocabulary; `logits_softcap` c means c * tanh(logits / c). Of a shard, both have a part of the vocabulary,
    from `first_token` on.
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
        first_token: int = 0,
        embedding_scale: float | None = None,
        logits_softcap: float | None = None,
    ) -> None:
        self.config = config
        self.device, self.dtype = embedding.device, embedding.dtype
        self.attention_specs = tuple(layer.attention.spec for layer in layers)
        self.fingerprint = fingerprint
        self._first_token = first_token
        self._embedding, self._layers, self._norm, self._head = embedding, tuple(layers), norm, head
        self._rotaries = tuple(dict.fromkeys(layer.attention.rotary for layer in layers))
        # Rounded to the model's dtype first, as it was in training.
        self._scale = None if embedding_scale is None else torch.tensor(embedding_scale).to(embedding)
        self._softcap = logits_softcap
        self._stack = Stack.of(self._layers)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        assert isinstance(attention, AttentionBackend)
        x = F.embedding(token_ids, self._embedding)
        if self._scale is not None:
            x = x * self._scale
        turns = {rotary: rotary.at(positions) for rotary in self._rotaries}
        if self._stack is not None and self._stack.takes(x, attention):
            self._stack.run(x, turns, attention)
            return self._norm(x)
        for number, layer in enumerate(self._layers):
            x = layer(x, turns[layer.attention.rotary], attention, number)
        return self._norm(x)

    def spread(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend
    ) -> Generator[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `forward`, for a shard: yields what is to be added up over all shards, and goes on with the sum,
        in memory of its own."""
        tokens = token_ids - self._first_token
        known = (tokens >= 0) & (tokens < self._embedding.shape[0])
        x = F.embedding(tokens.where(known, 0), self._embedding) * known.unsqueeze(1)
        if self._scale is not None:
            x = x * self._scale
        x = yield x
        turns = {rotary: rotary.at(positions) for rotary in self._rotaries}
        for number, layer in enumerate(self._layers):
            x = yield from layer.spread(x, turns[layer.attention.rotary], attention, number)
        return self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._head(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()
