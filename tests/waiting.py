"""How tests on an event loop wait: for a condition, a minute at most."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable

PATIENCE_S = 60.0


async def until(condition: Callable[[], object], what: str = "what the test waits for") -> None:
    """Wait until `condition`, a function or a coroutine function, holds.

    Raises:
        AssertionError: it does not within a minute; says `what` did not come.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        holds = condition()
        if await holds if inspect.isawaitable(holds) else holds:
            return
        assert time.monotonic() < deadline_s, f"not in {PATIENCE_S:.0f} s: {what}"
        await asyncio.sleep(0.01)
