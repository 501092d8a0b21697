"""Which attention backend serves a model on a device, how large its blocks are, and making it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.attention import cuda, native, tiled
from baton.attention.base import AttentionBackend, AttentionSpec
from baton.config import BadSetting
from baton.errors import UnsupportedModel
from baton.kv.hashing import KvLayout


def preferred_block_size(device: torch.device, dtype: torch.dtype, specs: Sequence[AttentionSpec]) -> int:
    """Tokens per KV block that the backend for `specs` on `device` works best with."""
    if cuda.supports(device, dtype, specs):
        return cuda.PAGE_TOKENS
    return tiled.PREFERRED_BLOCK_SIZE


def block_bytes(specs: Sequence[AttentionSpec], dtype: torch.dtype, block_size: int) -> int:
    """Bytes of one KV block: keys and values of all layers.

    Raises:
        UnsupportedModel: layers differ in kv_heads or head_dim.
    """
    kv_heads, head_dim = _kv_shape(specs)
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

    `fingerprint` is the model's; with dtype and sizes it decides whose blocks may be shared.

    Raises:
        UnsupportedModel: layers differ in kv_heads or head_dim.
        BadSetting: the backend cannot use blocks of this size.
    """
    if block_size < 1 or block_size & (block_size - 1):
        raise BadSetting(f"--block-size {block_size} is no power of two", field="block_size")
    kv_heads, head_dim = _kv_shape(specs)
    flash = cuda.supports(device, dtype, specs)
    if flash and block_size % cuda.PAGE_TOKENS:
        raise BadSetting(
            f"--block-size {block_size} is no multiple of {cuda.PAGE_TOKENS}, as FlashAttention-2 needs",
            field="block_size",
        )
    layout = KvLayout(
        model_fingerprint=fingerprint,
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size,
        block_bytes=block_bytes(specs, dtype, block_size),
        format="layer,kv,token,head,dim" if flash else "layer,kv,head,token,dim",
    )
    outer = (total_blocks, len(specs), 2)
    if flash:
        shape = (*outer, block_size, kv_heads, head_dim)
        return cuda.FlashAttention(specs, cuda.FlashKvCache(layout, shape, dtype, device))
    shape = (*outer, kv_heads, block_size, head_dim)
    cache = tiled.TiledKvCache(layout, shape, dtype, device)
    if native.supports(device, dtype, specs):
        return native.NativeAttention(specs, cache)
    return tiled.TiledAttention(specs, cache)


def _kv_shape(specs: Sequence[AttentionSpec]) -> tuple[int, int]:
    kinds = {(spec.kv_heads, spec.head_dim) for spec in specs}
    if len(kinds) != 1:
        raise UnsupportedModel(
            f"layers differ in (kv_heads, head_dim): {sorted(kinds)}; one KV pool needs one shape"
        )
    ((kv_heads, head_dim),) = kinds
    return kv_heads, head_dim
