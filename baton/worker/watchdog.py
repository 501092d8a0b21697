"""Is the engine stuck in a step? Then its worker can only end, and be started anew."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback

from baton.engine.costs import Tally
from baton.engine.engine import THREAD
from baton.rpc.server import Server

log = logging.getLogger(__name__)

STUCK_STATUS = 70
"""Exit status of a worker that ends because its engine is stuck: EX_SOFTWARE of sysexits."""

_LOOKS = 60
_RAREST_LOOK_S = 1.0


class Watchdog:
    """Is told every `period_s` seconds how far the engine is, and says when a step has taken `timeout_s`.

    Time in which this process did not run (it was stopped, or its whole machine) does not count.
    """

    def __init__(self, timeout_s: float) -> None:
        self.period_s = min(_RAREST_LOOK_S, timeout_s / _LOOKS)
        self._timeout_s = timeout_s
        self._last_look_s: float | None = None
        self._steps = 0
        self._stuck_s = 0.0

    def stuck(self, now_s: float, *, steps: int, idle: bool) -> bool:
        """Whether the engine, which has computed so many steps and may have nothing to do, is stuck."""
        if idle or steps != self._steps or self._last_look_s is None:
            self._stuck_s = 0.0
        else:
            self._stuck_s += min(now_s - self._last_look_s, 2 * self.period_s)
        self._steps, self._last_look_s = steps, now_s
        return self._stuck_s >= self._timeout_s


async def end_when_stuck(tally: Tally, server: Server, timeout_s: float) -> None:
    """End this process when its engine is stuck: no other thread can stop that one."""
    watchdog = Watchdog(timeout_s)
    while True:
        await asyncio.sleep(watchdog.period_s)
        if watchdog.stuck(time.monotonic(), steps=tally.steps, idle=tally.is_idle):
            break
    log.critical(
        "a step of the engine has taken more than %g s (--step-timeout-s); this worker ends, to be started "
        "anew; its engine is here:\n%s",
        timeout_s,
        _stack_of(THREAD),
    )
    await server.set_serving(False)
    os._exit(STUCK_STATUS)  # the registry and every peer see its connections end


def _stack_of(thread_name: str) -> str:
    """Where the thread of that name is now; empty when there is none."""
    frames = sys._current_frames()
    return "".join(
        line
        for thread in threading.enumerate()
        if thread.name == thread_name and thread.ident in frames
        for line in traceback.format_stack(frames[thread.ident])
    )
