"""When does a worker that says nothing count as gone?"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from baton.errors import DeadlineExceeded

_LATE = 0.25


class SignsOfLife:
    """A block that ends when nothing was `seen` for `ttl_s` seconds, as far as this process was awake.

    A process that was itself stopped for longer than that (a paused machine, a frozen container) has
    not listened: nobody is gone for that, and everybody has `ttl_s` seconds from then on. Raises
    DeadlineExceeded out of the block.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._seen_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def seen(self) -> None:
        """There was a sign of life."""
        self._seen_s = self._loop.time()

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self.seen()
        self._look_in(self._ttl_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise DeadlineExceeded(f"no beat for {self._ttl_s} s") from None

    def _look_in(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._look, self._loop.time() + seconds)

    def _look(self, due_s: float) -> None:
        if self._loop.time() > due_s + _LATE * self._ttl_s:
            self.seen()
        left_s = self._seen_s + self._ttl_s - self._loop.time()
        if left_s > 0:
            self._look_in(left_s)
        else:
            self._timeout.reschedule(self._loop.time())
