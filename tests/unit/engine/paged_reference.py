"""Stand-ins for the kernels that only a GPU has: called as those are, computed one query at a time."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch


def attend_one(q, keys, values, scale, window) -> torch.Tensor:
    """[heads, dim] of the last query over [tokens, kv_heads, dim]; `window` counts keys before it, -1 all."""
    if window >= 0:
        keys, values = keys[-window - 1 :], values[-window - 1 :]
    share = q.shape[0] // keys.shape[1]
    keys, values = (part.repeat_interleave(share, dim=1) for part in (keys, values))
    scores = (q[:, None] * keys.transpose(0, 1)).sum(-1) * scale
    return (scores.softmax(-1)[..., None] * values.transpose(0, 1)).sum(1)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k,
    block_table, num_splits,
) -> torch.Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn over pages."""
    assert num_splits == 1
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert block_table.dtype == seqused_k.dtype == cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    out = torch.empty_like(query)
    starts = cu_seq_q.tolist()
    for number, (start, end) in enumerate(pairwise(starts)):
        context = int(seqused_k[number])
        assert end - start <= max_q
        assert context == int(cu_seq_k[number + 1] - cu_seq_k[number]) <= max_k
        assert window_size[1] == 0 or (max_q == 1 and window_size == (-1, -1))
        pages = block_table[number, : -(-context // key.shape[1])].long()
        keys, values = (part[pages].flatten(0, 1)[:context] for part in (key, value))
        for row in range(start, end):
            seen = context - (end - 1 - row)
            out[row] = attend_one(query[row], keys[:seen], values[:seen], scale, window_size[0])
    return out


class _Wrapper:
    """What FlashInfer's two wrappers have in common."""

    def _plan(self, starts, page_starts, pages, last, heads, kv_heads, dim, page_size, options) -> None:
        self._described = starts, page_starts, pages, last
        self._options = options
        assert all(part.dtype == torch.int32 for part in self._described)

    def run(self, q, paged_kv_cache) -> torch.Tensor:
        starts, page_starts, pages, last = self._described
        keys, values = paged_kv_cache
        out = torch.empty_like(q)
        for number in range(len(last)):
            used = pages[page_starts[number] : page_starts[number + 1]].long()
            context = (len(used) - 1) * keys.shape[1] + int(last[number])
            own = [part[used].flatten(0, 1)[:context] for part in (keys, values)]
            for row in range(starts[number], starts[number + 1]):
                seen = context - (int(starts[number + 1]) - 1 - row)
                window, scale = self._options["window_left"], self._options["sm_scale"]
                out[row] = attend_one(q[row], *(part[:seen] for part in own), scale, window)
        return out


class _Prefill(_Wrapper):
    def __init__(self, workspace, kv_layout) -> None:
        assert kv_layout == "NHD"

    def plan(self, qo_indptr, indptr, indices, last_page_len, *sizes, causal, **options) -> None:
        assert causal
        self._plan(qo_indptr, indptr, indices, last_page_len, *sizes, options)


class _Decode(_Wrapper):
    """Reads the buffers that it was made with, as a graph does."""

    def __init__(
        self, workspace, kv_layout, *, use_cuda_graph, use_tensor_cores, paged_kv_indptr_buffer,
        paged_kv_indices_buffer, paged_kv_last_page_len_buffer,
    ) -> None:  # fmt: skip
        assert kv_layout == "NHD" and use_cuda_graph
        self._buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer

    def plan(self, indptr, indices, last_page_len, *sizes, **options) -> None:
        for buffer, given in zip(self._buffers, (indptr, indices, last_page_len), strict=True):
            buffer[: len(given)] = given
        starts = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self._plan(starts, *self._buffers, *sizes, options)


flashinfer = SimpleNamespace(
    BatchPrefillWithPagedKVCacheWrapper=_Prefill, BatchDecodeWithPagedKVCacheWrapper=_Decode
)
