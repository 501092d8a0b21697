"""How a process that `baton up` starts is tied to it: `python -m baton.cli.child PARENT_PID MODULE ...`.

On Linux the kernel kills this process when its parent dies, however it dies, so that nothing of a
cluster outlives `baton up`. Done here, in the child, because code run between fork and exec would
have to be safe in a parent that has threads.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when `parent_pid`, its parent, is gone."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the call above took effect
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
