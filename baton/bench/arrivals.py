"""When requests are due: arrival processes."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal

Pattern = Literal["poisson", "constant"]


def arrivals(pattern: Pattern, rate_per_s: float, rng: Random, burstiness: float = 1.0) -> Iterator[float]:
    """Endless times in seconds, ascending from 0 on, `rate_per_s` of them per second on average.

    Args:
        burstiness: of `poisson`: the shape of the gamma distribution that gaps are drawn from. 1 is a
            Poisson process, less is burstier, more is more even (as in `vllm bench serve`).
    """
    gap_s, now_s = 1 / rate_per_s, 0.0
    while True:
        yield now_s
        now_s += gap_s if pattern == "constant" else rng.gammavariate(burstiness, gap_s / burstiness)
