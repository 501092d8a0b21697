"""A decode worker that dies as soon as it computes one certain token."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from baton.engine.interfaces import Step
from baton.engine.runner import Runner
from baton.engine.scheduler import Scheduled
from baton.worker.command import worker_command

DEADLY_TOKEN = 4050


def begin_or_die(self: Runner, batch: Sequence[Scheduled]) -> Step:
    for item in batch:
        if DEADLY_TOKEN in item.sequence.tokens[item.start : item.start + item.query_len]:
            os.kill(os.getpid(), signal.SIGKILL)
    return begin(self, batch)


if __name__ == "__main__":
    begin = Runner.begin
    Runner.begin = begin_or_die  # type: ignore[method-assign,assignment]
    worker_command("decode")()
