"""A worker whose engine never ends a step once there is a file: `STUCK_FILE FLAGS...`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from baton.engine.runner import Runner
from baton.worker.command import worker_command

if __name__ == "__main__":
    file, begin = Path(sys.argv.pop(1)), Runner.begin

    def stuck_begin(self, batch):  # type: ignore[no-untyped-def]
        if file.exists():
            threading.Event().wait()
        return begin(self, batch)

    Runner.begin = stuck_begin  # type: ignore[method-assign]
    worker_command("decode")()
