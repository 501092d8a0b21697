"""Attention by the compiled CPU kernel: straight from the pool's blocks, nothing gathered or copied.

Results are bit for bit independent of batching, chunking and threads: a query visits tiles of keys that
start at multiples of 64 in its sequence's own positions, one after the other, with an online softmax.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch

from baton.attention.base import AttentionBackend, AttentionBatch, AttentionSpec
from baton.attention.tiled import TiledKvCache
from baton.models import native

#: (query, head) rows that share one visit of a tile; as in native.cpp.
_QUERY_ROWS = 128


class _Call(ctypes.Structure):
    """native.cpp's `Attention`; keep the two in step."""

    _fields_ = (
        ("pool", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("block_stride", "layer_offset", "block_size")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        ("out", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("first_rows", "contexts", "first_blocks", "blocks")),
        ("pieces", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("piece_sequence", "piece_query")),
        ("piece_queries", ctypes.c_int64),
    )


def supports(device: torch.device, dtype: torch.dtype, specs: Sequence[AttentionSpec]) -> bool:
    """Whether the kernel can serve layers like `specs` on `device`."""
    return (
        device.type == "cpu"
        and native.kernel("attend", torch.empty(0, dtype=dtype)) is not None
        and all(spec.heads // spec.kv_heads <= _QUERY_ROWS for spec in specs)
    )


class NativeAttention(AttentionBackend):
    """See the module. Every layer must have the same kv_heads and head_dim.

    `layer_values` is how far apart the layers of a block lie.
    """

    name = "native"

    def __init__(self, specs: Sequence[AttentionSpec], cache: TiledKvCache) -> None:
        kernel = native.kernel("attend", cache.storage)
        if kernel is None:
            raise RuntimeError("no compiled kernel; ask supports() first")
        self.cache, self._specs, self._kernel = cache, tuple(specs), kernel
        _, layers, _, kv_heads, block_size, dim = cache.storage.shape
        self.layer_values = 2 * kv_heads * block_size * dim
        self._call = _Call(
            pool=cache.storage.data_ptr(),
            block_stride=layers * self.layer_values,
            block_size=block_size,
            heads=specs[0].heads,
            kv_heads=kv_heads,
            dim=dim,
        )
        self._arrays: dict[str, array[int]] = {}

    def begin(self, batch: AttentionBatch) -> None:
        call, size = self._call, self._call.block_size
        spec = self._specs[0]
        call.piece_queries = _QUERY_ROWS // (spec.heads // spec.kv_heads)
        names = ("first_rows", "contexts", "first_blocks", "blocks", "piece_sequence", "piece_query")
        first_rows, contexts, first_blocks, blocks, sequences, queries = (array("q") for _ in names)
        contexts.extend(batch.context_lens)
        row = 0
        for number, new in enumerate(batch.query_lens):
            first_rows.append(row)
            row += new
            first_blocks.append(len(blocks))
            blocks.extend(batch.block_tables[number][: -(-batch.context_lens[number] // size)])
            starts = range(0, new, call.piece_queries)
            sequences.extend([number] * len(starts))
            queries.extend(starts)
        first_rows.append(row)
        arrays = (first_rows, contexts, first_blocks, blocks, sequences, queries)
        self._arrays = dict(zip(names, arrays, strict=True))  # the kernel reads them where they lie
        for name, values in self._arrays.items():
            setattr(call, name, values.buffer_info()[0])
        call.sequences, call.pieces = len(contexts), len(queries)

    @property
    def step(self) -> int:
        """Address of native.cpp's `Attention` of the step that `begin` prepared; the layers' part is open."""
        return ctypes.addressof(self._call)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        call, spec = self._call, self._specs[layer]
        q, k, v = _rows(q), _rows(k), _rows(v)
        out = torch.empty(q.shape[0], spec.heads * spec.head_dim, dtype=q.dtype)
        call.layer_offset = layer * self.layer_values
        call.heads, call.window = spec.heads, spec.window or 0
        call.scale, call.softcap = spec.scale, spec.softcap or 0.0
        call.q, call.k, call.v, call.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        call.q_stride, call.k_stride, call.v_stride = q.stride(0), k.stride(0), v.stride(0)
        self._kernel(self.step, torch.get_num_threads())
        return out


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, dim] with each token's values in one run; tokens may be any distance apart."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()
