"""Attention on NVIDIA GPUs by FlashInfer (the extra `gpu`): any page size, soft-capping, split keys.

FlashInfer plans a step on the CPU, once per kind of layer; a plan then serves all layers of its kind.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from baton.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, FixedRows
from baton.attention.paged import PagedKvCache
from baton.device import Device, Download

#: Any size will do. Larger blocks make for shorter tables, smaller ones share more of a prompt.
PREFERRED_BLOCK_SIZE = 64

_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 * 1024 * 1024


def supports(device: torch.device, dtype: torch.dtype, specs: Sequence[AttentionSpec]) -> bool:
    """Whether FlashInfer is installed and can serve layers like `specs` on `device`."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and all(spec.head_dim in _HEAD_DIMS for spec in specs)
        and importlib.util.find_spec("flashinfer") is not None
    )


@dataclass(frozen=True)
class _Pages:
    """The pages of each sequence one after the other, as FlashInfer wants them: int32 on the CPU."""

    starts: torch.Tensor
    pages: torch.Tensor
    last_page_lens: torch.Tensor

    @classmethod
    def of(cls, batch: AttentionBatch, cache: PagedKvCache, rows: int, device: Device) -> _Pages:
        """Of `rows` sequences; those that the batch leaves over have one token in the spare block."""
        size = cache.block_size
        starts = [0]
        pages: list[int] = []
        last: list[int] = []
        for context, blocks in zip(batch.context_lens, batch.block_tables, strict=True):
            pages += blocks[: -(-context // size)]
            starts.append(len(pages))
            last.append((context - 1) % size + 1)
        left = rows - len(last)
        starts += range(len(pages) + 1, len(pages) + 1 + left)
        pages += [cache.spare_block] * left
        last += [1] * left
        parts = (torch.tensor(values, dtype=torch.int32) for values in (starts, pages, last))
        return cls(*(device.stage(part) for part in parts))


class FlashInferAttention(AttentionBackend):
    """See the module. Every layer must have the same kv_heads and head_dim.

    `library` is the module `flashinfer`.
    """

    name = "flashinfer"

    def __init__(
        self, specs: Sequence[AttentionSpec], cache: PagedKvCache, device: Device, library: ModuleType
    ) -> None:
        self.cache: PagedKvCache = cache
        self.device = device
        self.kinds = tuple(dict.fromkeys(specs))
        self.library = library
        self.workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=cache.storage.device)
        self._specs = tuple(specs)
        self._planned: Download | None = None
        self._wrappers: dict[AttentionSpec, Any] = {}
        self._new_rows = torch.empty(0, dtype=torch.int64)
        # FlashInfer leaves its classes untyped.
        self._any_length: dict[AttentionSpec, Any] = {
            spec: library.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD") for spec in self.kinds
        }

    def begin(self, batch: AttentionBatch) -> None:
        self.wait_for_plans()
        pages = _Pages.of(batch, self.cache, len(batch.query_lens), self.device)
        starts = torch.nn.functional.pad(torch.tensor(batch.query_lens).cumsum(0), (1, 0)).int()
        starts = self.device.stage(starts)
        indices = self.device.send(pages.pages)
        for spec, wrapper in self._any_length.items():
            wrapper.plan(
                starts,
                pages.starts,
                indices,
                pages.last_page_lens,
                *self._shape(spec),
                causal=True,
                **self._options(spec),
            )
        self.enter(self._any_length, self.cache.new_rows(batch, self.device))

    def plan_decode(self, wrappers: dict[AttentionSpec, Any], batch: AttentionBatch, rows: int) -> None:
        """Plan a step of one new token per sequence with decode wrappers made for `rows` sequences."""
        self.wait_for_plans()
        pages = _Pages.of(batch, self.cache, rows, self.device)
        indices = self.device.send(pages.pages)
        for spec, wrapper in wrappers.items():
            wrapper.plan(
                pages.starts, indices, pages.last_page_lens, *self._shape(spec), **self._options(spec)
            )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self._new_rows, k, v)
        out: torch.Tensor = self._wrappers[self._specs[layer]].run(q, self.cache.of_layer(layer))
        return out.flatten(1)

    def fixed_rows(self, rows: int, longest_context: int) -> FixedRows | None:
        return _FlashInferRows(self, rows, longest_context)

    def enter(self, wrappers: dict[AttentionSpec, Any], new_rows: torch.Tensor) -> None:
        """Attend by these plans from now on, and write new tokens to these rows."""
        self._wrappers, self._new_rows = wrappers, new_rows
        self._planned = self.device.download([])

    def wait_for_plans(self) -> None:
        """Plans are copied to the device from buffers that the next ones overwrite."""
        if self._planned is not None:
            self._planned.wait()

    def _shape(self, spec: AttentionSpec) -> tuple[int, int, int, int]:
        return spec.heads, spec.kv_heads, spec.head_dim, self.cache.block_size

    def _options(self, spec: AttentionSpec) -> dict[str, object]:
        dtype = self.cache.storage.dtype
        return {
            "sm_scale": spec.scale,
            "window_left": -1 if spec.window is None else spec.window - 1,
            "logits_soft_cap": spec.softcap,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }


class _FlashInferRows(FixedRows):
    def __init__(self, backend: FlashInferAttention, rows: int, longest_context: int) -> None:
        cache, device = backend.cache, backend.cache.storage.device
        width = min(-(-longest_context // cache.block_size), cache.total_blocks)

        def room(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self._backend, self._rows = backend, rows
        self._new_rows = torch.empty(rows, dtype=torch.int64, device=device)
        self._wrappers = {
            spec: backend.library.BatchDecodeWithPagedKVCacheWrapper(
                backend.workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,  # the other kernels know few ratios of heads to KV heads
                paged_kv_indptr_buffer=room(rows + 1),
                paged_kv_indices_buffer=room(rows * width),
                paged_kv_last_page_len_buffer=room(rows),
            )
            for spec in backend.kinds
        }

    def begin(self, batch: AttentionBatch) -> None:
        backend = self._backend
        backend.plan_decode(self._wrappers, batch, self._rows)
        rows = backend.device.tensor(backend.cache.last_rows(batch, self._rows), torch.int64)
        self._new_rows.copy_(rows)
        backend.enter(self._wrappers, self._new_rows)


def library() -> ModuleType:
    """The module. Kernels are compiled when they are first planned, which takes minutes once per machine."""
    return importlib.import_module("flashinfer")
