"""What the engine and the models ask of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.kv.hashing import KvLayout


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention: scores = softcap(q @ k * scale), causal, at most `window` keys back.

    `window` counts the query itself (Mistral's and Gemma's sliding_window); None is global.
    `softcap` c means c * tanh(scores / c) before the mask (Gemma 2).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one engine step, in the order of their tokens in the flat batch.

    `query_lens[i]` new tokens of sequence i end at context position `context_lens[i]` (new tokens
    included); `block_tables[i]` are the pool blocks that hold positions 0 .. context_lens[i] - 1, in
    order, and may be longer than needed.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]


class KvCache(ABC):
    """The KV pool of one worker: one allocation, blocks outermost, so that one block of all layers
    is one contiguous range of `layout.block_bytes` bytes at `address + id * block_bytes`."""

    layout: KvLayout
    total_blocks: int

    @property
    @abstractmethod
    def storage(self) -> torch.Tensor:
        """The whole pool; its first axis is the block id. What NIXL registers."""


class FixedRows(ABC):
    """Steps of one new token for each of at most so many sequences, described in tensors that stay where
    they are, for graphs recorded over them."""

    @abstractmethod
    def begin(self, batch: AttentionBatch) -> None:
        """As `AttentionBackend.begin`. Rows that the batch leaves over write to a block outside the pool."""


class Attention(ABC):
    """What a step's attention is prepared with, and the KV it works on: a backend, or one per device."""

    name: str

    @property
    @abstractmethod
    def layout(self) -> KvLayout:
        """Of whole blocks, with all heads."""

    @property
    @abstractmethod
    def caches(self) -> Sequence[KvCache]:
        """The pools, one per device; they have as many blocks."""

    @abstractmethod
    def begin(self, batch: AttentionBatch) -> None:
        """Prepare the indices of one step."""

    def fixed_rows(self, rows: int, longest_context: int) -> FixedRows | None:
        """Room for steps of up to `rows` sequences of up to `longest_context` tokens; None where the backend
        cannot describe a step in tensors that stay."""
        return None


class AttentionBackend(Attention):
    """Writes the step's keys and values into the pool and attends over what the pool holds.

    `begin` is called once per step before the layers run; everything that does not depend on the
    layer is computed there.
    """

    cache: KvCache

    @property
    def layout(self) -> KvLayout:
        return self.cache.layout

    @property
    def caches(self) -> Sequence[KvCache]:
        return (self.cache,)

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store k and v of the new tokens and return their attention output.

        q is [tokens, heads, head_dim]; k and v are [tokens, kv_heads, head_dim], rotary applied.
        Returns [tokens, heads * head_dim] in q's dtype.
        """
