"""All layers of a step in one call of the compiled kernels, for models made of the usual parts.

Between layers nothing is left to Python then, whose share of a small model's step is otherwise the larger
one. Results are bit for bit those of the layers called one by one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from baton.attention.base import AttentionBackend
from baton.attention.native import NativeAttention
from baton.models import native
from baton.models.layers import NATIVE_ACTIVATIONS, OffsetRmsNorm, Panels, RmsNorm
from baton.models.rope import Rotary
from baton.models.sublayers import GatedMlp, Layer, Turn


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float), ("round_first", ctypes.c_int))


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "chunk")),
    )


class _Turn(ctypes.Structure):
    _fields_ = (("cosines", ctypes.c_void_p), ("sines", ctypes.c_void_p), ("half", ctypes.c_int64))


class _Layer(ctypes.Structure):
    """native.cpp's `Layer`, as the structures above and below are its namesakes; keep them in step."""

    _fields_ = (
        *((name, _Norm) for name in ("before_attention", "query", "key", "after_attention")),
        *((name, _Norm) for name in ("before_mlp", "after_mlp")),
        *((name, _Product) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_int64) for name in ("activation", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("turn", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "normed", "qkv", "mixed", "back", "wide", "gated")),
        *((name, ctypes.c_int64) for name in ("rows", "size")),
        ("turns", ctypes.c_void_p),
        ("layer_values", ctypes.c_int64),
    )


class Stack:
    """The layers of one model, described to the kernel. They must live as long as this."""

    def __init__(self, layers: Sequence[_Layer], rotaries: Sequence[Rotary]) -> None:
        self._layers = (_Layer * len(layers))(*layers)
        self._rotaries = tuple(rotaries)
        first = layers[0]
        size, mixed = first.out.outputs, first.out.inputs
        #: Values of one row in normed, qkv, mixed, back, wide and gated.
        self._widths = (size, first.qkv.outputs, mixed, size, first.gate_up.outputs, first.down.inputs)

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Stack | None:
        """None where a layer has a part that the kernel does not know."""
        rotaries = list(dict.fromkeys(layer.attention.rotary for layer in layers))
        described = [_describe(layer, rotaries) for layer in layers]
        known = [layer for layer in described if layer is not None]
        alike = len({layer.attention.spec.heads for layer in layers}) == 1
        return cls(known, rotaries) if alike and len(known) == len(layers) else None

    def takes(self, x: torch.Tensor, attention: AttentionBackend) -> bool:
        """Whether a step of rows `x` is better computed here; oneDNN is as good at many rows."""
        return isinstance(attention, NativeAttention) and x.shape[0] <= native.MOST_ROWS

    def run(self, x: torch.Tensor, turns: Mapping[Rotary, Turn], attention: AttentionBackend) -> None:
        """Take x [rows, hidden] through the layers in place; `attention` has begun the step."""
        assert isinstance(attention, NativeAttention)
        kernel = native.kernel("stack", x)
        assert kernel is not None
        rows = x.shape[0]
        room = torch.empty(rows * sum(self._widths), dtype=x.dtype)
        addresses, at = [], room.data_ptr()
        for width in self._widths:
            addresses.append(at)
            at += rows * width * x.itemsize
        turned = [turns[rotary] for rotary in self._rotaries]
        described = (_Turn * len(turned))(
            *(_Turn(cos.data_ptr(), sin.data_ptr(), cos.shape[-1]) for cos, sin in turned)
        )
        step = _Step(
            x.data_ptr(), *addresses, rows, x.shape[1], ctypes.addressof(described), attention.layer_values
        )
        kernel(self._layers, len(self._layers), ctypes.byref(step), attention.step, torch.get_num_threads())


def _describe(layer: Layer, rotaries: Sequence[Rotary]) -> _Layer | None:
    """None where a part is of a kind that the kernel does not know."""
    attention, mlp, spec = layer.attention, layer.mlp, layer.attention.spec
    if not isinstance(mlp, GatedMlp) or mlp.activation not in NATIVE_ACTIVATIONS:
        return None
    linears = {"qkv": attention.qkv, "out": attention.out, "gate_up": mlp.gate_up, "down": mlp.down}
    products = {name: linear.panels for name, linear in linears.items()}
    norms = {
        "before_attention": layer.attention_norm,
        "query": attention.query_norm,
        "key": attention.key_norm,
        "after_attention": layer.after_attention_norm,
        "before_mlp": layer.mlp_norm,
        "after_mlp": layer.after_mlp_norm,
    }
    described = _Layer(
        activation=NATIVE_ACTIVATIONS.index(mlp.activation),
        window=spec.window or 0,
        scale=spec.scale,
        softcap=spec.softcap or 0.0,
        turn=rotaries.index(attention.rotary),
    )
    for name, panels in products.items():
        if panels is None:
            return None
        setattr(described, name, _product(panels))
    for name, norm in norms.items():
        if norm is None:
            continue
        if not isinstance(norm, (RmsNorm, OffsetRmsNorm)):
            return None
        setattr(described, name, _norm(norm))
    return described


def _product(panels: Panels) -> _Product:
    return _Product(panels.weight, panels.bias, panels.inputs, panels.outputs, panels.chunk)


def _norm(norm: RmsNorm | OffsetRmsNorm) -> _Norm:
    return _Norm(norm.native.weight.data_ptr(), norm.native.eps, norm.native.round_first)
