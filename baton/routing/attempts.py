"""How often is a request placed, whom does it keep away from, and how long may it wait for a worker?"""

from __future__ import annotations

NOBODY: frozenset[str] = frozenset()

SESSION_BROKEN = "session_broken"
"""Why a placement ended that lost its connection."""

FIRST_WAIT_S = 2.0
"""For how long a new request waits for the cluster to change: the only decode worker may have lost its
session for a moment, or another may be about to take over. Longer would keep it from another router."""

REPLACEMENT_WAIT_S = 60.0
"""For how long a request that was placed before waits for the cluster to change: a worker that takes over may
still be starting, and a kvstore that would tell of it may be away meanwhile."""

BREAKS_S = 30.0
"""For how long placements do not count that ended because a connection broke: that says nothing of the
request, and a network that is cut for a while breaks one connection after another."""


class Attempts:
    """The placements of one request, of which `most` in a row may end without having brought a token.

    Times are in seconds of any clock.
    """

    def __init__(self, most: int, now_s: float) -> None:
        self._most = most
        self._failed = NOBODY
        self._again = False
        self._went_on_s = now_s
        self._left = most

    @property
    def avoiding(self) -> tuple[frozenset[str], ...]:
        """Whom to keep away from, in the order in which to ask: those where it has failed, then nobody,
        because they may be all there is, and well again."""
        return (self._failed, NOBODY) if self._failed else (NOBODY,)

    @property
    def wait_s(self) -> float:
        """Seconds for which it may wait to be placeable."""
        return REPLACEMENT_WAIT_S if self._again else FIRST_WAIT_S

    def failed(self, worker_id: str | None, tokens: int, now_s: float, *, broke: bool = False) -> bool:
        """A placement brought so many tokens and ended early, through a worker if it is at fault, perhaps
        because its connection `broke`: may there be another?"""
        if worker_id is not None:
            self._failed |= {worker_id}
        self._again = True
        if tokens:
            self._went_on_s, self._left = now_s, self._most
        if not broke or now_s - self._went_on_s > BREAKS_S:
            self._left -= 1
        return self._left > 0
