"""What is a starting worker doing, and how long did each part of its start take?"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)

#: A part that takes longer is worth a line.
_LONG_S = 1.0

Report = Callable[[int, int], None]
"""Called with how much is done and of how much."""


class Startup:
    """Times the parts of a start, which follow one another; the first is what happened before this was made,
    since the process began. A terminal shows a bar meanwhile, a log gets a line for each long part."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._took_s = {"imports": time.time() - psutil.Process().create_time()}

    @contextmanager
    def part(self, name: str) -> Iterator[Report]:
        """Time the block as the part `name`; it may report how far it is."""
        started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        task = shown.add_task(name, total=None)
        with shown:
            yield lambda done, total: shown.update(task, completed=done, total=total)
        took_s = self._took_s[name] = time.monotonic() - started
        if took_s > _LONG_S:
            log.info("%s took %.1f s", name, took_s)

    def summary(self) -> str:
        """All parts in order, such as `2.1 s: imports 1.2, weights 0.7, step times 0.2`."""
        parts = ", ".join(f"{name} {took_s:.1f}" for name, took_s in self._took_s.items())
        return f"{sum(self._took_s.values()):.1f} s: {parts}"
