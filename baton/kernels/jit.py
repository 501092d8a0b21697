"""The Triton source of `baton.kernels.fused`, one program per row or token. Importing it needs triton.

The order of rounding is that of the layers' own arithmetic: float32 inside, the tensors' dtype where theirs
stores a tensor.
"""

import triton
import triton.language as tl


@triton.jit
def norm(
    x, x_row, x_group, delta, total, weight, y, groups, size, eps,
    ADDS: tl.constexpr, ROUND_FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y = rms_norm(x) of a group of a row; with ADDS of x + delta, which goes to `total`, all contiguous."""
    program = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    inside = at < size
    out = program.to(tl.int64) * size + at
    start = (program // groups).to(tl.int64) * x_row + (program % groups) * x_group
    values = tl.load(x + start + at, mask=inside, other=0.0)
    dtype = values.dtype
    if ADDS:
        values = (values.to(tl.float32) + tl.load(delta + out, mask=inside, other=0.0).to(tl.float32)).to(
            dtype
        )
        tl.store(total + out, values, mask=inside)
    wide = values.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    if ROUND_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    scaled = normed * tl.load(weight + at, mask=inside, other=0.0)
    tl.store(y + out, scaled.to(dtype), mask=inside)


@triton.jit
def gate(gate_up, y, size, GELU: tl.constexpr, WIDTH: tl.constexpr):
    """y = activation(gate) * up, part of a row; gate and up side by side."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < size
    gates = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    wide = gates.to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        active = 0.5 * wide * (2.0 - 2.0 / (1.0 + tl.exp(2.0 * inner)))
    else:
        active = wide / (1.0 + tl.exp(-wide))
    result = active.to(gates.dtype).to(tl.float32) * up
    tl.store(y + row * size + at, result.to(gates.dtype), mask=inside)


@triton.jit
def rotate(heads, token_stride, count, dim, cos, sin, half, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Turn the leading 2 * half dimensions of all heads of a token, in place."""
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (head < count) & (at < half)
    first_at = heads + token * token_stride + head * dim + at
    first = tl.load(first_at, mask=inside, other=0.0)
    second = tl.load(first_at + half, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * half + at, mask=at < half, other=0.0)
    s = tl.load(sin + token * half + at, mask=at < half, other=0.0)
    wide = first.to(tl.float32)
    tl.store(first_at, (wide * c - second * s).to(first.dtype), mask=inside)
    tl.store(first_at + half, (second * c + wide * s).to(first.dtype), mask=inside)


@triton.jit
def store(pool, rows, values_after, k, k_stride, v, v_stride, size, WIDTH: tl.constexpr):
    """Copy a token's keys to its row of the pool, and its values so many rows behind."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < size
    to = pool + tl.load(rows + token) * size + at
    tl.store(to, tl.load(k + token * k_stride + at, mask=inside), mask=inside)
    tl.store(to + values_after * size, tl.load(v + token * v_stride + at, mask=inside), mask=inside)


@triton.jit
def last_kept(order, weights, wanted, last, vocab, WIDTH: tl.constexpr):
    """The largest number such that the weights of a row's tokens from it on in `order` make up `wanted`."""
    row = tl.program_id(0).to(tl.int64)
    need = tl.load(wanted + row)
    low = tl.full((), -2147483648, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = low + (high - low) // 2
        sums = tl.zeros((WIDTH,), tl.int64)
        for start in range(0, vocab, WIDTH):
            at = start + tl.arange(0, WIDTH)
            inside = at < vocab
            numbers = tl.load(order + row * vocab + at, mask=inside, other=0).to(tl.int64)
            each = tl.load(weights + row * vocab + at, mask=inside, other=0)
            sums += tl.where(numbers > middle, each, 0)
        enough = tl.sum(sums, 0) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    tl.store(last + row, high)
