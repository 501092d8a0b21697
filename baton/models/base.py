"""What the engine asks of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from baton.attention.base import Attention, AttentionSpec
from baton.models.config import ModelConfig


class Model(ABC):
    """A causal language model, its weights in place.

    `fingerprint` names the weights and everything else its KV depends on. `dtype` is that of hidden
    states and KV. On CPU, results are bit for bit independent of how tokens are batched and chunked.
    """

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    attention_specs: Sequence[AttentionSpec]
    fingerprint: str

    @property
    def shards(self) -> Sequence[Model]:
        """Its parts, one per device: several when it is spread. `device` is that of the first, and
        `attention_specs` are of one part: each attends over some heads, in a KV pool of its own."""
        return (self,)

    @abstractmethod
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Final hidden states [T, hidden] of a flat batch.

        `token_ids` and `positions` are int64 [T] on the model's device; `attention.begin` has been
        called with the batch they come from.
        """

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, vocab] of rows [R, hidden] that `forward` returned."""
