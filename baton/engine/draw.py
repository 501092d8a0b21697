"""Which token a row of logits yields: filters without a sort, and a counter-based draw.

The random number for a token depends only on (request seed, position in the context). A request that
migrates, is preempted or is replayed therefore draws the same numbers, wherever it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.device import Device
from baton.kernels import fused
from baton.sampling import Sampling

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ONE = 2.0**52


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), 53 bits, a pure function of its arguments.

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014) over seed and counter.
    """
    return (_mix(_mix(seed & _MASK64) + position * _GOLDEN) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], device: Device
) -> torch.Tensor:
    """One token per row by inverting the filtered distribution's cumulative sum in token order.

    logits is float32 [rows, vocab]; returns int64 [rows]. Order of filters as in vLLM: temperature, min-p,
    top-k, top-p. Of equally likely tokens those with the smaller ids stay.

    Probabilities become whole numbers first: their sums are exact in whatever order a device adds them, so
    neither the batch nor the device decides between two tokens.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return device.tensor(values, torch.float64)[:, None]

    vocab = logits.shape[-1]
    likely = (logits.double() / column([s.temperature for s in samplings])).softmax(-1)
    if any(s.min_p > 0 for s in samplings):
        floor = likely.amax(-1, keepdim=True) * column([s.min_p for s in samplings])
        likely = likely.masked_fill(likely < floor, 0.0)
    weights = likely.mul_(_ONE).long()
    if any(0 < s.top_k < vocab or s.top_p < 1 for s in samplings):
        order = _ordered(logits)
        counts = [s.top_k if 0 < s.top_k < vocab else vocab for s in samplings]
        if min(counts) < vocab:
            weights = _keep_most_likely(weights, order, counts, device)
        if any(s.top_p < 1 for s in samplings):
            # A share of 1 is everything, so more than that is never reached.
            shares = [s.top_p if s.top_p < 1 else 2.0 for s in samplings]
            weights = _keep_share(weights, order, column(shares))
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((column(uniforms) * total.double()).long(), total - 1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=vocab - 1)


def _keep_most_likely(
    weights: torch.Tensor, order: torch.Tensor, counts: Sequence[int], device: Device
) -> torch.Tensor:
    """`weights` of the counts[i] tokens of row i that are first in `order`; a count of the row's length keeps
    all."""
    most = max(count for count in counts if count < order.shape[-1])
    best = order.topk(most, dim=-1).values
    limit = device.tensor(counts, torch.int64)[:, None]
    smallest = best.gather(1, limit.clamp(max=most) - 1)
    smallest = smallest.masked_fill(limit > most, torch.iinfo(order.dtype).min)
    equal, above = order == smallest, order > smallest
    room = limit - above.sum(-1, keepdim=True)
    return torch.where(above | (equal & (equal.cumsum(-1) <= room)), weights, 0)


def _keep_share(weights: torch.Tensor, order: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """`weights` of the first tokens in `order`, as few as make up `shares` [rows, 1] of their sum."""
    wanted = (shares * weights.sum(-1, keepdim=True).double()).ceil().long()
    last = fused.last_kept(order, weights, wanted)
    if last is None:
        last = _last_kept(order, weights, wanted)
    last = last.int()
    above, equal = torch.where(order > last, weights, 0), order == last
    each = torch.where(equal, weights, 0).amax(-1, keepdim=True)
    before = above.sum(-1, keepdim=True) + (equal.cumsum(-1) - 1) * each
    return torch.where((order > last) | (equal & (before < wanted)), weights, 0)


def _last_kept(order: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """See `fused.last_kept`: the range of 32-bit numbers is halved once for each bit."""
    # The tokens above `low` make up what is wanted, those above `high` do not.
    low = torch.full_like(wanted, -(2**31))
    high = torch.full_like(wanted, 2**31 - 1)
    for _ in range(32):
        middle = low + (high - low) // 2
        enough = torch.where(order > middle.int(), weights, 0).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return high


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """int32 numbers in the order of float32 `values`."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return torch.where(bits < 0, -(2**31) - bits, bits)
