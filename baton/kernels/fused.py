"""When tensors are computed in one pass by Triton, and how its kernels are called.

Every function returns None (or False) where torch must compute: on the CPU, or without triton.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

log = logging.getLogger(__name__)

_GATE_WIDTH = 1024
_SEARCH_WIDTH = 4096


@cache
def kernels() -> ModuleType | None:
    """`baton.kernels.jit`, or None where Triton is missing or cannot compile, as without a C compiler."""
    try:
        jit = import_module("baton.kernels.jit")
        trial = torch.ones(1, 2, device="cuda")
        jit.gate[1, 1](trial, torch.empty(1, 1, device="cuda"), 1, GELU=False, WIDTH=16)
    except Exception as error:  # whatever a compiler may say
        log.warning("no Triton, torch computes, more slowly: %s", error)
        return None
    return jit


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, round_first: bool) -> torch.Tensor | None:
    """rms_norm(x) * weight over the last axis of [rows, size] or [rows, groups, size]; weight is float32."""
    jit = _for(x)
    if jit is None or x.stride(-1) != 1:
        return None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    groups, group_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    _norm(jit, x, x.stride(0), groups, group_stride, None, None, weight, eps, round_first, y)
    return y


def add_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, *, round_first: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(x + delta, rms_norm(x + delta) * weight), all contiguous [rows, size]."""
    jit = _for(x)
    if jit is None or not (x.is_contiguous() and delta.is_contiguous()):
        return None
    total, y = torch.empty_like(x), torch.empty_like(x)
    _norm(jit, x, x.stride(0), 1, 0, delta, total, weight, eps, round_first, y)
    return total, y


def gate(gate_up: torch.Tensor, *, gelu: bool) -> torch.Tensor | None:
    """silu(gate) * up (or gelu_tanh) [rows, size] of contiguous [rows, 2 * size]."""
    jit = _for(gate_up)
    if jit is None or not gate_up.is_contiguous():
        return None
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    jit.gate[rows, -(-size // _GATE_WIDTH)](gate_up, y, size, GELU=gelu, WIDTH=_GATE_WIDTH)
    return y


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Turn `heads` [tokens, heads, dim] in place by contiguous cos, sin [tokens, 1, half]; whether done."""
    jit = _for(heads)
    if jit is None or heads.stride()[1:] != (heads.shape[2], 1):
        return False
    tokens, count, dim = heads.shape
    half = cos.shape[-1]
    widths = {"HEADS": _power_of_two(count), "WIDTH": _power_of_two(half)}
    jit.rotate[tokens,](heads, heads.stride(0), count, dim, cos, sin, half, **widths)
    return True


def store(
    pool: torch.Tensor, rows: torch.Tensor, values_after: int, k: torch.Tensor, v: torch.Tensor
) -> bool:
    """Write keys and values [tokens, kv_heads, dim] to `pool` [rows, kv_heads * dim]: a token's keys to row
    rows[token] (int64), its values `values_after` rows behind; whether done."""
    jit = _for(pool)
    inner = (k.shape[2], 1)
    if jit is None or k.stride()[1:] != inner or v.stride()[1:] != inner:
        return False
    size = pool.shape[1]
    width = _power_of_two(size)
    jit.store[k.shape[0],](pool, rows, values_after, k, k.stride(0), v, v.stride(0), size, WIDTH=width)
    return True


def last_kept(order: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """Per row the largest number such that the int64 `weights` of tokens from it on in int32 `order` sum to
    `wanted` [rows, 1] or more; int64 [rows, 1]."""
    jit = _for(order)
    if jit is None:
        return None
    last = torch.empty_like(wanted)
    rows, vocab = order.shape
    jit.last_kept[rows,](order, weights, wanted, last, vocab, WIDTH=_SEARCH_WIDTH, num_warps=8)
    return last


def _norm(
    jit: ModuleType,
    x: torch.Tensor,
    row_stride: int,
    groups: int,
    group_stride: int,
    delta: torch.Tensor | None,
    total: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    round_first: bool,
    y: torch.Tensor,
) -> None:
    size = x.shape[-1]
    width = _power_of_two(size)
    jit.norm[x.shape[0] * groups,](
        x, row_stride, group_stride, delta, total, weight, y, groups, size, eps,
        ADDS=delta is not None, ROUND_FIRST=round_first, WIDTH=width, num_warps=min(16, max(1, width // 512)),
    )  # fmt: skip


def _for(x: torch.Tensor) -> ModuleType | None:
    return kernels() if x.is_cuda else None


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
