"""Which attention backend serves a model on a device, how large its blocks are, and making it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from baton.attention import flash, flashinfer, native, tiled
from baton.attention.base import Attention, AttentionBackend, AttentionSpec
from baton.attention.paged import PagedKvCache
from baton.attention.sharded import ShardedAttention
from baton.config import AttentionName, BadSetting
from baton.device import device_of
from baton.errors import UnsupportedModel
from baton.kv.hashing import KvLayout
from baton.models.base import Model


def preferred_block_size(
    device: torch.device,
    dtype: torch.dtype,
    specs: Sequence[AttentionSpec],
    wanted: AttentionName = "auto",
) -> int:
    """Tokens per KV block that the backend for `specs` on `device` works best with.

    Raises:
        BadSetting: the backend `wanted` cannot serve them.
    """
    return _PREFERRED_BLOCK_SIZES[_choose(device, dtype, specs, wanted)]


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
    wanted: AttentionName = "auto",
) -> AttentionBackend:
    """Allocate the KV pool on `device` and the backend that uses it (`.cache`).

    `fingerprint` is the model's; with dtype and sizes it decides whose blocks may be shared.

    Raises:
        UnsupportedModel: layers differ in kv_heads or head_dim.
        BadSetting: the backend `wanted` cannot serve the layers, or not with blocks of this size.
    """
    if block_size < 1 or block_size & (block_size - 1):
        raise BadSetting(f"--block-size {block_size} is no power of two", field="block_size")
    kv_heads, head_dim = _kv_shape(specs)
    name = _choose(device, dtype, specs, wanted)
    if name == "flash" and block_size % flash.PAGE_TOKENS:
        raise BadSetting(
            f"--block-size {block_size} is no multiple of {flash.PAGE_TOKENS}, as FlashAttention-2 needs",
            field="block_size",
        )
    layout = KvLayout(
        model_fingerprint=fingerprint,
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size,
        block_bytes=block_bytes(specs, dtype, block_size),
        format="layer,kv,token,head,dim" if name in _ON_GPU else "layer,kv,head,token,dim",
    )
    outer = (total_blocks, len(specs), 2)
    if name in _ON_GPU:
        pages = PagedKvCache(layout, (*outer, block_size, kv_heads, head_dim), dtype, device)
        if name == "flash":
            return flash.FlashAttention(specs, pages, device_of(device), flash.kernel())
        return flashinfer.FlashInferAttention(specs, pages, device_of(device), flashinfer.library())
    shape = (*outer, kv_heads, block_size, head_dim)
    cache = tiled.TiledKvCache(layout, shape, dtype, device)
    if name == "native":
        return native.NativeAttention(specs, cache)
    return tiled.TiledAttention(specs, cache)


def create_attention(
    model: Model, total_blocks: int, block_size: int, wanted: AttentionName = "auto"
) -> Attention:
    """The backend of `create_backend` for a model, or one on each device that it is spread over."""
    backends = []
    for shard in model.shards:
        with device_of(shard.device).current():
            backends.append(
                create_backend(
                    *(shard.device, model.dtype, shard.attention_specs, total_blocks, block_size),
                    model.fingerprint,
                    wanted,
                )
            )
    if len(backends) == 1:
        return backends[0]
    kv_heads, _ = _kv_shape(model.attention_specs)
    per_head = block_bytes(model.attention_specs, model.dtype, block_size) // kv_heads
    return ShardedAttention(backends, per_head * model.config.kv_heads)


def _choose(
    device: torch.device, dtype: torch.dtype, specs: Sequence[AttentionSpec], wanted: AttentionName
) -> str:
    """The backend `wanted`, or the first that can serve the layers."""
    if wanted == "auto":
        return next(name for name, supports in _BACKENDS.items() if supports(device, dtype, specs))
    if not _BACKENDS[wanted](device, dtype, specs):
        raise BadSetting(
            f"--attention {wanted} cannot serve this model in {dtype} on {device.type}; leave it at auto",
            field="attention",
        )
    return wanted


def _always(device: torch.device, dtype: torch.dtype, specs: Sequence[AttentionSpec]) -> bool:
    return True


#: By name, the fastest first.
_BACKENDS: Mapping[str, Callable[[torch.device, torch.dtype, Sequence[AttentionSpec]], bool]] = {
    "flashinfer": flashinfer.supports,
    "flash": flash.supports,
    "native": native.supports,
    "tiled": _always,
}
_PREFERRED_BLOCK_SIZES = {
    "flashinfer": flashinfer.PREFERRED_BLOCK_SIZE,
    "flash": flash.PAGE_TOKENS,
    "native": tiled.PREFERRED_BLOCK_SIZE,
    "tiled": tiled.PREFERRED_BLOCK_SIZE,
}
_ON_GPU = ("flashinfer", "flash")


def _kv_shape(specs: Sequence[AttentionSpec]) -> tuple[int, int]:
    kinds = {(spec.kv_heads, spec.head_dim) for spec in specs}
    if len(kinds) != 1:
        raise UnsupportedModel(
            f"layers differ in (kv_heads, head_dim): {sorted(kinds)}; one KV pool needs one shape"
        )
    ((kv_heads, head_dim),) = kinds
    return kv_heads, head_dim
