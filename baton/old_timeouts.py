"""`asyncio.timeout` as it is from Python 3.11.3 on, for those before it; Debian 12 has 3.11.2.

A task in which a TaskGroup has failed once counts a cancellation for ever. Before 3.11.3 a time-out in such a
task is then taken for somebody else's cancellation, and the task ends in silence: so no worker came back to a
kvstore that had been away for longer than its time-outs.
"""

from __future__ import annotations

import asyncio
import asyncio.timeouts
from types import TracebackType


class Timeout(asyncio.Timeout):  # type: ignore[misc]  # it is meant to be final
    """Ends in TimeoutError unless the task was cancelled since it was entered."""

    async def __aenter__(self) -> Timeout:
        self._cancelled_before = _cancelled()
        await super().__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await super().__aexit__(kind, error, traceback)
        if self.expired() and kind is asyncio.CancelledError and _cancelled() <= self._cancelled_before:
            raise TimeoutError from error


def use() -> None:
    """Let `asyncio.timeout` give these."""
    asyncio.timeouts.Timeout = Timeout  # type: ignore[misc]


def _cancelled() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0
