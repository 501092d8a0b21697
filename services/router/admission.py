"""Whether the router takes on another request now, or asks the client to come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from baton.errors import InvalidRequest, Overloaded, Unavailable
from services.router.metrics import Metrics

_RETRY_AFTER_S = 1.0


class Admission:
    """Counts choices in flight, the unit of work workers see: a request with n=4 counts as four."""

    def __init__(self, max_running: int, metrics: Metrics) -> None:
        self._max_running = max_running
        self._running = 0
        self._closed = False
        self._metrics = metrics

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Refuse everything from now on: the router is stopping."""
        self._closed = True

    @contextmanager
    def enter(self, choices: int) -> Iterator[None]:
        """Hold places for `choices` choices while inside.

        Raises:
            Overloaded: too many are in flight.
            InvalidRequest: more than could ever be in flight.
            Unavailable: the router is stopping.
        """
        if self._closed:
            raise Unavailable("the router is shutting down; send the request again")
        if choices > self._max_running:
            raise InvalidRequest(
                f"n: {choices} choices in one request, this router takes at most {self._max_running}",
                field="n",
            )
        if self._running + choices > self._max_running:
            raise Overloaded(
                f"{self._running} requests are in flight and at most {self._max_running} are allowed; "
                f"retry after {_RETRY_AFTER_S:.0f} s",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._running += choices
        self._metrics.running.set(self._running)
        try:
            yield
        finally:
            self._running -= choices
            self._metrics.running.set(self._running)
