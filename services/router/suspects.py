"""Which workers requests keep away from for a while, because placements on them broke just now."""

from __future__ import annotations

import time

_FIRST_S = 1.0
_LONGEST_S = 30.0


class Suspects:
    """Backs off from workers whose placements break: 1 s at first, twice as long with every break after that,
    30 s at most, until one works. Without it every request would try such a worker again and pay for it.

    A back-off is advice: where nobody else can take a request, a suspect is tried all the same.
    """

    def __init__(self) -> None:
        self._backoffs: dict[str, tuple[float, float]] = {}  # until when, and how long that was

    def broke(self, worker_id: str) -> bool:
        """A placement broke on the worker; whether a back-off begins. Those under way when one began say
        nothing new and do not prolong it."""
        now_s = time.monotonic()
        until_s, last_s = self._backoffs.get(worker_id, (0.0, 0.0))
        if now_s < until_s:
            return False
        length_s = min(_LONGEST_S, 2 * last_s) or _FIRST_S
        self._backoffs[worker_id] = (now_s + length_s, length_s)
        return True

    def worked(self, worker_id: str) -> None:
        """A placement on the worker gave a token: all is forgiven."""
        self._backoffs.pop(worker_id, None)

    def avoided(self) -> frozenset[str]:
        """The workers to keep away from now."""
        if not self._backoffs:
            return frozenset()
        now_s = time.monotonic()
        return frozenset(worker_id for worker_id, (until_s, _) in self._backoffs.items() if now_s < until_s)
