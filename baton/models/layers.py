"""The arithmetic layers are made of, each row independent of the others, bit for bit.

A token's result must not depend on what else is in the batch, how its prompt was chunked, or how many
threads ran: then a disaggregated answer equals the aggregated one, and a replayed one the original.
Measured on CPU with torch 2.13: oneDNN products of prepacked weights, exp, tanh, cos, sin, float32
rsqrt and sums along the last axis keep rows independent. Sigmoid, silu and gelu do not (their
vectorised loop and its scalar tail round differently), nor do matrix products of fewer than 4 rows.
The compiled kernels (native.cpp) keep rows independent by construction.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from baton.kernels import fused
from baton.models import native

MIN_ROWS = 4
_PACK_ROWS = 8

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Panels:
    """A product as native.cpp takes it: addresses, sizes, and how many inputs are added up apart."""

    weight: int
    bias: int | None
    inputs: int
    outputs: int
    chunk: int


class Linear:
    """y = x @ weight.T + bias. weight is [out, in]; x is [rows, in].

    `panels` describes it to the compiled kernels, as long as it lives; None where they cannot compute it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = packs(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS) if self._packed else weight
        self._bias = bias
        self._on_cpu = weight.device.type == "cpu"
        self.panels = _panels(weight, self._weight, bias) if self._packed else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._on_cpu:
            return F.linear(x, self._weight, self._bias)
        rows = x.shape[0]
        if self.panels is not None and rows <= native.MOST_ROWS:
            return _panel_product(x, self.panels)
        if rows < MIN_ROWS:
            x = F.pad(x, (0, 0, 0, MIN_ROWS - rows))
        y = (
            _packed_product(x, self._weight, self._bias)
            if self._packed
            else F.linear(x, self._weight, self._bias)
        )
        return y[:rows]


def packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies by `weight` on this machine."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


@dataclass(frozen=True)
class NativeNorm:
    """A norm as native.cpp takes it; `round_first`: to the model's dtype before the weight, not after."""

    weight: torch.Tensor
    eps: float
    round_first: bool


class RmsNorm:
    """x / rms(x) * weight over the last axis, the division in float32 (Llama's order of rounding)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.native = NativeNorm(weight.float(), eps, round_first=True)
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = _native_norm(x, self.native)
        return self._weight * _normalized(x, self.native.eps).to(x.dtype) if y is None else y


class OffsetRmsNorm:
    """x / rms(x) * (1 + weight), all in float32 (Gemma)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.native = NativeNorm(1.0 + weight.float(), eps, round_first=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = _native_norm(x, self.native)
        return (_normalized(x, self.native.eps) * self.native.weight).to(x.dtype) if y is None else y


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), in float32, returned in x's dtype."""
    wide = x.float()
    return (wide / (1.0 + torch.exp(-wide))).to(x.dtype)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of gelu, in float32, returned in x's dtype."""
    wide = x.float()
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * (wide * wide * wide))
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(x.dtype)


def added(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y [rows, size]. May use the memory of x for the result."""
    kernel = native.kernel("add", x)
    if kernel is None or not (x.is_contiguous() and y.is_contiguous()):
        return x + y
    kernel(x.data_ptr(), y.data_ptr(), *x.shape, torch.get_num_threads())
    return x


def added_and_normed(
    x: torch.Tensor, y: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y, norm(x + y)), [rows, size] each. May use the memory of x for the sum."""
    if isinstance(norm, RmsNorm | OffsetRmsNorm):
        compiled = norm.native
        by_gpu = fused.add_norm(x, y, compiled.weight, compiled.eps, round_first=compiled.round_first)
        if by_gpu is not None:
            return by_gpu
    total = added(x, y)
    return total, norm(total)


def gated(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """activation(gate) * up [rows, size] of [rows, 2 * size], gate and up side by side."""
    if activation in NATIVE_ACTIVATIONS:
        by_gpu = fused.gate(gate_up, gelu=activation is gelu_tanh)
        if by_gpu is not None:
            return by_gpu
    kernel = native.kernel("gate", gate_up)
    if kernel is None or activation not in NATIVE_ACTIVATIONS or not gate_up.is_contiguous():
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, size, dtype=gate_up.dtype)
    kind = NATIVE_ACTIVATIONS.index(activation)
    kernel(gate_up.data_ptr(), rows, size, kind, y.data_ptr(), torch.get_num_threads())
    return y


#: In the order of native.cpp's enumeration.
NATIVE_ACTIVATIONS: tuple[Activation, ...] = (silu, gelu_tanh)

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


def _native_norm(x: torch.Tensor, norm: NativeNorm) -> torch.Tensor | None:
    """The compiled norm over the last axis of [rows, size] or [rows, groups, size]; None without one."""
    by_gpu = fused.norm(x, norm.weight, norm.eps, round_first=norm.round_first)
    if by_gpu is not None:
        return by_gpu
    kernel = native.kernel("norm", x)
    if kernel is None or x.stride(-1) != 1:
        return None
    y = torch.empty(x.shape, dtype=x.dtype)
    groups, group_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    kernel(
        x.data_ptr(),
        x.shape[0],
        groups,
        x.shape[-1],
        x.stride(0),
        group_stride,
        norm.weight.data_ptr(),
        norm.eps,
        norm.round_first,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


#: Of `_chunk`, by (dtype, out, in, has bias); None where the kernel and oneDNN do not agree.
_CHUNKS: dict[tuple[torch.dtype, int, int, bool], int | None] = {}


def _panels(weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> Panels | None:
    """Of `packed`, which oneDNN made of `weight` [out, in]; None unless a trial finds all bits of a product
    equal to oneDNN's, which computes those of many rows."""
    if native.kernel("linear", weight) is None:
        return None
    outputs, inputs = weight.shape
    addresses = torch.ops.mkldnn.data_ptr(packed), None if bias is None else bias.data_ptr()
    shape = (weight.dtype, outputs, inputs, bias is not None)
    if shape not in _CHUNKS:
        _CHUNKS[shape] = _chunk(weight, packed, bias)
    chunk = _CHUNKS[shape]
    return None if chunk is None else Panels(*addresses, inputs, outputs, chunk)


def _chunk(weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> int | None:
    """How many inputs oneDNN adds up apart in products with `packed`."""
    if not _is_in_panels(weight, packed):
        return None
    inputs = weight.shape[1]
    x = torch.rand(67, inputs, generator=torch.Generator().manual_seed(0)).to(weight.dtype) - 0.5
    expected = _packed_product(x, packed, bias)
    addresses = torch.ops.mkldnn.data_ptr(packed), None if bias is None else bias.data_ptr()
    for guess in (512, 1024, inputs, 256, 2048, 128):
        if torch.equal(_panel_product(x, Panels(*addresses, inputs, weight.shape[0], guess)), expected):
            return guess
    return None


def _panel_product(x: torch.Tensor, panels: Panels) -> torch.Tensor:
    """The product by the compiled kernel, which reads weights faster than oneDNN where rows are few."""
    kernel = native.kernel("linear", x)
    assert kernel is not None
    x, rows = x.contiguous(), x.shape[0]
    y = torch.empty(rows, panels.outputs, dtype=x.dtype)
    kernel(
        x.data_ptr(),
        rows,
        panels.inputs,
        panels.chunk,
        panels.weight,
        panels.outputs,
        panels.bias,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _packed_product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _is_in_panels(weight: torch.Tensor, packed: torch.Tensor) -> bool:
    """Whether `packed` holds `weight` as native.cpp reads it."""
    outputs, inputs = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    size = weight.numel() * weight.itemsize
    if outputs % native.PANEL or inputs % pair or torch.ops.mkldnn._nbytes(packed) != size:
        return False
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    panels = torch.frombuffer(memory, dtype=weight.dtype).view(-1, inputs // pair, native.PANEL, pair)
    first, last = weight[: native.PANEL], weight[-native.PANEL :]
    return all(
        torch.equal(panel, rows.view(native.PANEL, -1, pair).transpose(0, 1))
        for panel, rows in ((panels[0], first), (panels[-1], last))
    )
