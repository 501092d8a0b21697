"""The arithmetic layers are made of, each row independent of the others, bit for bit.

A token's result must not depend on what else is in the batch, how its prompt was chunked, or how many
threads ran: then a disaggregated answer equals the aggregated one, and a replayed one the original.
Measured on CPU with torch 2.13: oneDNN products of prepacked weights, exp, tanh, cos, sin, float32
rsqrt and sums along the last axis keep rows independent. Sigmoid, silu and gelu do not (their
vectorised loop and its scalar tail round differently), nor do matrix products of fewer than 4 rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

MIN_ROWS = 4
_PACK_ROWS = 8

Activation = Callable[[torch.Tensor], torch.Tensor]


class Linear:
    """y = x @ weight.T + bias. weight is [out, in]; x is [rows, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = _packs(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS) if self._packed else weight
        self._bias = bias
        self._on_cpu = weight.device.type == "cpu"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._on_cpu:
            return F.linear(x, self._weight, self._bias)
        rows = x.shape[0]
        if rows < MIN_ROWS:
            x = F.pad(x, (0, 0, 0, MIN_ROWS - rows))
        if self._packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        else:
            y = F.linear(x, self._weight, self._bias)
        return y[:rows]


class RmsNorm:
    """x / rms(x) * weight over the last axis, the division in float32 (Llama's order of rounding)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._weight * _normalized(x, self._eps).to(x.dtype)


class OffsetRmsNorm:
    """x / rms(x) * (1 + weight), all in float32 (Gemma)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps = 1.0 + weight.float(), eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (_normalized(x, self._eps) * self._weight).to(x.dtype)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), in float32, returned in x's dtype."""
    wide = x.float()
    return (wide / (1.0 + torch.exp(-wide))).to(x.dtype)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of gelu, in float32, returned in x's dtype."""
    wide = x.float()
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * (wide * wide * wide))
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)


#: By the name config.json uses in hidden_act or hidden_activation.
ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "swish": silu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
}


def _normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies by `weight` on this machine."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
