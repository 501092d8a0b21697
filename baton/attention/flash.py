"""Attention on NVIDIA GPUs: torch's paged variable-length FlashAttention-2."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch

from baton.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, FixedRows
from baton.attention.paged import PagedKvCache
from baton.device import Device

log = logging.getLogger(__name__)

#: FlashAttention-2 reads wrong rows from pages that are no multiple of this.
PAGE_TOKENS = 256

Kernel = Callable[..., torch.Tensor]


def kernel() -> Kernel:
    """torch's `varlen_attn`."""
    # Imported here: it loads torch's compiler, seconds that a worker without a GPU need not spend.
    from torch.nn.attention.varlen import varlen_attn

    return cast(Kernel, varlen_attn)


@cache
def _reads_pages(device: torch.device) -> bool:
    """Whether this torch's kernel reads pages and can be kept from splitting keys: tried, because in some
    versions the one that comes with torch takes the arguments and refuses."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, 1, 64, dtype=torch.bfloat16, device=device)

    ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        kernel()(
            *(zeros(1), zeros(1, PAGE_TOKENS), zeros(1, PAGE_TOKENS), ends, ends, 1, 1),
            scale=1.0,
            window_size=(-1, -1),
            enable_gqa=False,
            seqused_k=ends[1:],
            block_table=ends[:1, None],
            num_splits=1,
        )
    except (ImportError, TypeError, RuntimeError) as error:
        log.info("torch's FlashAttention reads no pages here: %s", str(error).splitlines()[0])
        return False
    return True


def supports(device: torch.device, dtype: torch.dtype, specs: Sequence[AttentionSpec]) -> bool:
    """Whether the kernel can serve layers like `specs` on `device`: Ampere or newer, half precision,
    heads of up to 256 dimensions, no soft-capping."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and all(spec.softcap is None and spec.head_dim % 8 == 0 and spec.head_dim <= 256 for spec in specs)
        and _reads_pages(device)
    )


@dataclass(frozen=True)
class _Step:
    """What the kernel needs to know of one step; int32 on the device except `new_rows`.

    `new_rows` is int64 [tokens], see `PagedKvCache`; `block_tables` [sequences, blocks].
    """

    new_rows: torch.Tensor
    query_starts: torch.Tensor
    context_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    longest_query: int
    longest_context: int


class FlashAttention(AttentionBackend):
    """See the module. Every layer must have the same kv_heads and head_dim.

    `kernel` is called like torch's `varlen_attn`.
    """

    name = "flash"

    def __init__(
        self, specs: Sequence[AttentionSpec], cache: PagedKvCache, device: Device, kernel: Kernel
    ) -> None:
        self.cache: PagedKvCache = cache
        self._specs = tuple(specs)
        self._device = device
        self._kernel = kernel
        self._step: _Step | None = None

    def begin(self, batch: AttentionBatch) -> None:
        send = self._device.send
        queries, contexts = torch.tensor(batch.query_lens), torch.tensor(batch.context_lens)
        self._step = _Step(
            new_rows=self.cache.new_rows(batch, self._device),
            query_starts=send(torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int()),
            context_starts=send(torch.nn.functional.pad(contexts.cumsum(0), (1, 0)).int()),
            context_lens=send(contexts.int()),
            block_tables=send(self._tables(batch, len(batch.query_lens))),
            longest_query=max(batch.query_lens),
            longest_context=max(batch.context_lens),
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        step, spec = self._step, self._specs[layer]
        if step is None:
            raise RuntimeError("attend before begin")
        self.cache.write(layer, step.new_rows, k, v)
        if spec.window is not None:
            window = (spec.window - 1, 0)
        else:
            # One query sees everything; without a mask the kernel reads keys once for all its heads.
            window = (-1, 0) if step.longest_query > 1 else (-1, -1)
        out = self._kernel(
            q,
            *self.cache.of_layer(layer),
            step.query_starts,
            step.context_starts,
            step.longest_query,
            step.longest_context,
            scale=spec.scale,
            window_size=window,
            enable_gqa=spec.heads != spec.kv_heads,
            seqused_k=step.context_lens,
            block_table=step.block_tables,
            # Splitting the keys returns wrong rows with paged keys, and makes results depend on the batch.
            num_splits=1,
        )
        return out.flatten(1)

    def fixed_rows(self, rows: int, longest_context: int) -> FixedRows | None:
        return _FlashRows(self, rows, longest_context)

    def enter(self, step: _Step) -> None:
        """Attend in `step` from now on."""
        self._step = step

    def fill(self, step: _Step, batch: AttentionBatch) -> None:
        """Describe `batch`, one new token per sequence, in the tensors of `step`."""
        rows = step.new_rows.shape[0]
        contexts = [*batch.context_lens, *([1] * (rows - len(batch.context_lens)))]
        step.new_rows.copy_(self._device.tensor(self.cache.last_rows(batch, rows), torch.int64))
        step.context_lens.copy_(self._device.tensor(contexts, torch.int32))
        torch.cumsum(step.context_lens, 0, dtype=torch.int32, out=step.context_starts[1:])
        tables = self._device.send(self._tables(batch, rows))
        step.block_tables[:, : tables.shape[1]].copy_(tables)

    def _tables(self, batch: AttentionBatch, rows: int) -> torch.Tensor:
        """int32 [rows, blocks] on the CPU: the blocks of each sequence's context, then the spare one."""
        size, spare = self.cache.block_size, self.cache.spare_block
        used = [-(-context // size) for context in batch.context_lens]
        width = max(used, default=1)
        filled = [
            [*blocks[:count], *([spare] * (width - count))]
            for blocks, count in zip(batch.block_tables, used, strict=True)
        ]
        return torch.tensor(filled + [[spare] * width] * (rows - len(filled)), dtype=torch.int32)


class _FlashRows(FixedRows):
    def __init__(self, backend: FlashAttention, rows: int, longest_context: int) -> None:
        cache, device = backend.cache, backend.cache.storage.device
        width = min(-(-longest_context // cache.block_size), cache.total_blocks)
        self._backend = backend
        self._step = _Step(
            new_rows=torch.empty(rows, dtype=torch.int64, device=device),
            query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
            context_starts=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            context_lens=torch.ones(rows, dtype=torch.int32, device=device),
            block_tables=torch.full((rows, width), cache.spare_block, dtype=torch.int32, device=device),
            longest_query=1,
            longest_context=longest_context,
        )

    def begin(self, batch: AttentionBatch) -> None:
        self._backend.fill(self._step, batch)
        self._backend.enter(self._step)
