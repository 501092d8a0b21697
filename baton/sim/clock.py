"""Virtual time: what happens next, in order of time and then of asking."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Clock:
    """Events of one simulation. Nothing is ever taken back: who no longer wants a call ignores it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        """How many have happened."""
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, time_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Call `happen(*arguments)` at `time_s`, now at the earliest."""
        time_s = max(time_s, self.now_s)
        heapq.heappush(self._queue, (time_s, next(self._numbers), happen, arguments))

    def after(self, seconds: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Call `happen(*arguments)` in so many seconds."""
        self.at(self.now_s + seconds, happen, *arguments)

    def run(self, until_s: float) -> None:
        """Let happen what there is until `until_s` or until nothing is left."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            self.now_s, _, happen, arguments = heapq.heappop(queue)
            self.events += 1
            happen(*arguments)
