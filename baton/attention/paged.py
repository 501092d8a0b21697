"""The KV pool as GPU kernels read it: pages of tokens, with all heads of a token side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.attention.base import AttentionBatch, KvCache
from baton.attention.slots import new_token_slots
from baton.device import Device
from baton.kernels import fused
from baton.kv.hashing import KvLayout


class PagedKvCache(KvCache):
    """[blocks, layers, 2 (keys, values), block_size, kv_heads, head_dim].

    `spare_block` lies behind the pool: what belongs to no sequence is written there.
    """

    def __init__(
        self, layout: KvLayout, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.total_blocks = layout, shape[0]
        self.spare_block = shape[0]
        self._pages = torch.zeros(shape[0] + 1, *shape[1:], dtype=dtype, device=device)
        _, self._layers, _, self.block_size, kv_heads, head_dim = shape
        self._token_rows = self._pages.view(-1, kv_heads * head_dim)

    @property
    def storage(self) -> torch.Tensor:
        return self._pages[:-1]

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [blocks + 1, block_size, kv_heads, head_dim] with gaps between blocks."""
        return self._pages[:, layer, 0], self._pages[:, layer, 1]

    def new_rows(self, batch: AttentionBatch, device: Device) -> torch.Tensor:
        """int64 [tokens] on the device: where `write` puts the new tokens of a batch."""
        blocks, offsets = new_token_slots(batch, self.block_size)
        return device.send(blocks * self._block_rows + offsets)

    def last_rows(self, batch: AttentionBatch, rows: int) -> list[int]:
        """Where `write` puts the last token of each sequence; the spare block for the rest of `rows`."""
        size, stride = self.block_size, self._block_rows
        filled = [
            blocks[(context - 1) // size] * stride + (context - 1) % size
            for context, blocks in zip(batch.context_lens, batch.block_tables, strict=True)
        ]
        return filled + [self.spare_block * stride] * (rows - len(filled))

    def write(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store keys and values [tokens, kv_heads, head_dim]."""
        keys = self._token_rows[2 * layer * self.block_size :]
        if not fused.store(keys, rows, self.block_size, k, v):
            keys.index_copy_(0, rows, k.flatten(1))
            keys[self.block_size :].index_copy_(0, rows, v.flatten(1))

    @property
    def _block_rows(self) -> int:
        return self._layers * 2 * self.block_size
