"""Attention on NVIDIA GPUs: torch's paged variable-length FlashAttention-2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from baton.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, KvCache
from baton.attention.slots import new_token_slots
from baton.kv.hashing import KvLayout

#: FlashAttention-2 reads wrong rows from pages that are no multiple of this.
PAGE_TOKENS = 256


def supports(device: torch.device, dtype: torch.dtype, specs: Sequence[AttentionSpec]) -> bool:
    """Whether the kernel can serve layers like `specs` on `device`: Ampere or newer, half precision,
    heads of up to 256 dimensions, no soft-capping."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and all(spec.softcap is None and spec.head_dim % 8 == 0 and spec.head_dim <= 256 for spec in specs)
    )


class FlashKvCache(KvCache):
    """[blocks, layers, 2 (keys, values), block_size, kv_heads, head_dim]."""

    def __init__(
        self, layout: KvLayout, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.total_blocks = layout, shape[0]
        self._storage = torch.zeros(*shape, dtype=dtype, device=device)

    @property
    def storage(self) -> torch.Tensor:
        return self._storage


@dataclass(frozen=True)
class _Step:
    """What the kernel needs to know of one step; int32 on the GPU except `new_rows`.

    `new_rows` is int64 [tokens]: where layer 0's keys of the new tokens go, in rows of one token.
    """

    new_rows: torch.Tensor
    query_starts: torch.Tensor
    context_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    longest_query: int
    longest_context: int


class FlashAttention(AttentionBackend):
    """See the module. Every layer must have the same kv_heads and head_dim."""

    name = "flash"

    def __init__(self, specs: Sequence[AttentionSpec], cache: FlashKvCache) -> None:
        # Imported here: it loads torch's compiler, seconds that a worker without a GPU need not spend.
        from torch.nn.attention.varlen import varlen_attn

        self._varlen_attn = varlen_attn
        self.cache = cache
        self._specs = tuple(specs)
        _, self._layers, _, self._block_size, kv_heads, head_dim = cache.storage.shape
        self._token_rows = cache.storage.view(-1, kv_heads * head_dim)
        self._step: _Step | None = None

    def begin(self, batch: AttentionBatch) -> None:
        device, size = self.cache.storage.device, self._block_size
        used = [-(-context // size) for context in batch.context_lens]
        width = max(used)
        tables = torch.tensor(
            [
                [*blocks[:count], *([blocks[0]] * (width - count))]
                for blocks, count in zip(batch.block_tables, used, strict=True)
            ],
            dtype=torch.int32,
        )
        queries, contexts = torch.tensor(batch.query_lens), torch.tensor(batch.context_lens)
        new_blocks, offsets = new_token_slots(batch, size)
        self._step = _Step(
            new_rows=(new_blocks * (self._layers * 2 * size) + offsets).to(device),
            query_starts=torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int().to(device),
            context_starts=torch.nn.functional.pad(contexts.cumsum(0), (1, 0)).int().to(device),
            context_lens=contexts.int().to(device),
            block_tables=tables.to(device),
            longest_query=max(batch.query_lens),
            longest_context=max(batch.context_lens),
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        step, spec = self._step, self._specs[layer]
        if step is None:
            raise RuntimeError("attend before begin")
        keys_at = layer * 2 * self._block_size
        self._token_rows[keys_at:].index_copy_(0, step.new_rows, k.flatten(1))
        self._token_rows[keys_at + self._block_size :].index_copy_(0, step.new_rows, v.flatten(1))
        out = self._varlen_attn(
            q,
            self.cache.storage[:, layer, 0],
            self.cache.storage[:, layer, 1],
            step.query_starts,
            step.context_starts,
            step.longest_query,
            step.longest_context,
            scale=spec.scale,
            window_size=(-1 if spec.window is None else spec.window - 1, 0),
            enable_gqa=spec.heads != spec.kv_heads,
            seqused_k=step.context_lens,
            block_table=step.block_tables,
            # Splitting the keys returns wrong rows with paged keys, and makes results depend on the batch.
            num_splits=1,
        )
        return cast(torch.Tensor, out).flatten(1)  # a pair only when asked for more
