"""What the simulator's benchmarks have in common: figures, and the highest load that is still served well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

GOOD = 0.9
"""The share of requests that must meet both targets."""

CONSOLE = Console(width=110)


@dataclass(frozen=True)
class Figure:
    """One line of the report that tools read."""

    figure: str
    value: float | None
    unit: str
    goal: str = ""
    met: bool | None = None
    peer: str = ""


def highest(good: Callable[[float], bool], guess: float, steps: int) -> float:
    """The highest value that is good: doubled or halved from `guess`, then narrowed by halves; 0 when a 16th
    of `guess` is not."""
    low = guess
    while not good(low):
        low /= 2
        if low < guess / 16:
            return 0.0
    high = 2 * low
    while low >= guess and good(high):  # twice what is less than the guess is known to be too much
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def ratio(figure: str, over: float, under: float, peer: str) -> Figure:
    """How many times `under` it is; None where that is nothing."""
    value = round(over / under, 2) if under else None
    return Figure(figure, value, "ratio", "> 1", value is not None and value > 1, peer)
