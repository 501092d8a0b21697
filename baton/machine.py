"""How many cores and GPUs and how much memory may processes of this machine use?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores this process may use: the smaller of its affinity and its cgroups' CPU quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _own_cgroups("cpu"):
        quota, period = _cpu_quota(folder)
        if quota > 0 and period > 0:
            cores = min(cores, ceil(quota / period))
    return max(1, cores)


def own_cores() -> tuple[int, ...]:
    """The cores this process may divide as it likes, ascending: its affinity, which a cpuset narrows.

    Empty where the system does not tell them, and where a quota allows less than all of them: bound to a few,
    processes would stand in each other's way while others idle.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return cores if len(cores) == usable_cores() else ()


def read_cores(text: str) -> frozenset[int]:
    """The cores that `text` lists, as the kernel does: 0-3,8.

    Raises:
        ValueError: it is no such list.
    """
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        some = range(int(first), int(last or first) + 1)
        if not some:
            raise ValueError(f"{part!r} is no range")
        cores.update(some)
    return frozenset(cores)


def list_cores(cores: Iterable[int]) -> str:
    """What `read_cores` reads."""
    return ",".join(map(str, sorted(cores)))


def available_bytes() -> int:
    """Bytes of memory new processes could get: what is free, or less where a cgroup limits it."""
    available = psutil.virtual_memory().available
    for folder in _own_cgroups("memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                available = min(available, max(0, limit - used))
    return int(available)


def gpu_count() -> int:
    """GPUs that new processes could use: those of the driver, or those CUDA_VISIBLE_DEVICES leaves."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _own_cgroups(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup for `controller` and of its ancestors, version 2 and version 1."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = _CGROUPS
        elif controller in controllers.split(","):
            root = _CGROUPS / controllers
        else:
            continue
        # In a container the path may be the host's, which does not exist here: the root then is ours.
        own = root / path.lstrip("/")
        yield root
        while own != root:
            if own.is_dir():
                yield own
            own = own.parent


def _cpu_quota(folder: Path) -> tuple[int, int]:
    """Microseconds of CPU per period and the period; zeros where there is no quota."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return (0, 0) if quota == "max" else (int(quota), int(period))
    except (OSError, ValueError):
        return _number(folder / "cpu.cfs_quota_us") or 0, _number(folder / "cpu.cfs_period_us") or 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
