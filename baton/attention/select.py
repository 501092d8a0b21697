"""Which attention backend serves a device, and how large its blocks are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.attention import cpu
from baton.attention.base import AttentionBackend, AttentionSpec
from baton.errors import UnsupportedModel
from baton.kv.hashing import KvLayout


def preferred_block_size(device: torch.device) -> int:
    """Tokens per block that the backend of `device` works best with."""
    return cpu.PREFERRED_BLOCK_SIZE


def block_bytes(specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int) -> int:
    """Bytes of one KV block: keys and values of all layers.

    Raises:
        UnsupportedModel: layers differ in kv_heads or head_dim.
    """
    kinds = {(spec.kv_heads, spec.head_dim) for spec in specs}
    if len(kinds) != 1:
        raise UnsupportedModel(
            f"layers differ in (kv_heads, head_dim): {sorted(kinds)}; one KV pool needs one shape"
        )
    ((kv_heads, head_dim),) = kinds
    return len(specs) * 2 * kv_heads * block_size * head_dim * dtype.itemsize


def create_backend(
    device: torch.device,
    dtype: torch.dtype,
    specs: Sequence[AttentionSpec],
    total_blocks: int,
    block_size: int,
    fingerprint: str,
) -> AttentionBackend:
    """Allocate the KV pool on `device` and the backend that uses it (`.cache`).

    `fingerprint` is the model's. Raises UnsupportedModel as `block_bytes` does.
    """
    layout = KvLayout(
        model_fingerprint=fingerprint,
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size,
        block_bytes=block_bytes(specs, dtype, block_size),
        format="layer,kv,head,token,dim",
    )
    shape = (total_blocks, len(specs), 2, specs[0].kv_heads, block_size, specs[0].head_dim)
    return cpu.CpuAttention(specs, cpu.CpuKvCache(layout, shape, dtype))
