"""How a value follows the files it was read from, without a task or a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from baton.errors import BatonError

log = logging.getLogger(__name__)

Value = TypeVar("Value")

_Stamp = tuple[tuple[int, int, int], ...]


class Reloaded(Generic[Value]):
    """What `load` makes of `paths`, loaded again when one of them changes.

    Whoever asks looks at the files, at most once in `every_s` seconds. What cannot be loaded, such as a file
    half written, is said once in the log and leaves the value as it is until the files change again.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        load: Callable[[], Value],
        *,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Raises:
            BatonError: what `load` raises, now.
        """
        self._paths = tuple(paths)
        self._load = load
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = _stamp(self._paths)
        self._value = load()
        self._next_s = clock() + every_s

    def current(self) -> Value:
        """The value as of the last look; from any thread."""
        if self._clock() >= self._next_s:
            self._look()
        return self._value

    def _look(self) -> None:
        with self._lock:
            self._next_s = self._clock() + self._every_s
            stamp = _stamp(self._paths)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            names = ", ".join(map(str, self._paths))
            try:
                self._value = self._load()
            except BatonError as error:
                log.error("%s cannot be used, what was there before still counts: %s", names, error)
            else:
                log.info("%s changed and is in use", names)


def _stamp(paths: Sequence[Path]) -> _Stamp:
    """What differs when a file is written, replaced, or reached through another symbolic link."""
    found = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)
