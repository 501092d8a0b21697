"""What does this machine have of what baton needs? Each check answers one line for `baton doctor`."""

from __future__ import annotations

import importlib.util
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from baton.cli.preflight import CannotStart, claim_port
from baton.config import Settings
from baton.errors import BatonError
from baton.machine import available_bytes, usable_cores
from baton.model_folder import model_folder
from baton.process import OPEN_FILES

_GIB = 1024**3
_SMALLEST_SHM = 1 * _GIB
_SMALLEST_NOFILE = 4096


class Verdict(Enum):
    """`NOTE` is worth knowing and stops nothing; `FAIL` stops a cluster from working here."""

    OK = "ok"
    NOTE = "note"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `remedy` says what to do about it."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


def python() -> Finding:
    """The package does not install on a Python that is too old, so this one never fails."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", Verdict.OK, f"{version} ({sys.executable})")


def cores_and_memory() -> Finding:
    return Finding(
        "cores, memory", Verdict.OK, f"{usable_cores()} cores, {available_bytes() / _GIB:.1f} GiB free"
    )


def torch_build() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{torch.__version__} ({build}, {capability})"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return Finding("torch", Verdict.FAIL, found, "pip install 'torch>=2.11'")
    return Finding("torch", Verdict.OK, found)


def nixl() -> Iterator[Finding]:
    """NIXL's import and plugins, and a real read between two processes."""
    from baton.transfer.base import TransferUnavailable
    from baton.transfer.loopback import loopback_check

    try:
        report = loopback_check()
    except TransferUnavailable as error:
        yield Finding(
            "NIXL",
            Verdict.FAIL,
            error.message,
            "reinstall it: pip install --force-reinstall nixl; UCX_LOG_LEVEL=info shows more",
        )
        return
    yield Finding("NIXL", Verdict.OK, f"{report.nixl_version}, plugins: {', '.join(sorted(report.plugins))}")
    if "UCX" not in report.plugins:
        yield Finding(
            "NIXL plugins", Verdict.FAIL, "no UCX plugin", "reinstall it: pip install --force-reinstall nixl"
        )
    speed = f"{report.bytes_per_s / 1e9:.1f} GB/s between two processes, over {report.path}"
    if "tcp" in report.path:
        yield Finding(
            "NIXL read",
            Verdict.NOTE,
            speed,
            "slow for one machine: let UCX use shared memory (UCX_TLS, /dev/shm)",
        )
    else:
        yield Finding("NIXL read", Verdict.OK, speed)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """KV between workers of one machine travels through it."""
    if not folder.is_dir():
        return Finding("shared memory", Verdict.NOTE, f"no {folder}: KV will travel over TCP on this machine")
    usage = shutil.disk_usage(folder)
    found = f"{folder}: {usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.free < _SMALLEST_SHM:
        return Finding(
            "shared memory",
            Verdict.NOTE,
            found,
            "give it 1 GiB or more: docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm",
        )
    return Finding("shared memory", Verdict.OK, found)


def open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(hard)} (hard limit)"
    if hard != resource.RLIM_INFINITY and hard < _SMALLEST_NOFILE:
        return Finding(
            "open files",
            Verdict.NOTE,
            found,
            f"many connections need more: ulimit -Hn {OPEN_FILES}, as root",
        )
    return Finding("open files", Verdict.OK, found)


def locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        return Finding(
            "locked memory", Verdict.NOTE, _limit(soft, "bytes"), "only RDMA needs more: ulimit -l unlimited"
        )
    return Finding("locked memory", Verdict.OK, "unlimited")


def gpu(settings: Settings) -> Finding:
    wanted = settings.model.device == "cuda"
    absent = Verdict.FAIL if wanted else Verdict.NOTE
    listed = _nvidia_smi()
    if not listed:
        remedy = "install the NVIDIA driver, or use --device cpu" if wanted else ""
        return Finding("GPU", absent, "no GPU: CPU will be used" if not wanted else "no GPU found", remedy)
    found = "; ".join(listed)
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", Verdict.OK, found)
    import torch

    if not torch.cuda.is_available():
        remedy = "install a CUDA build of torch that this driver supports, then use --device cuda"
        return Finding("GPU", absent, f"{found}; torch cannot use it", remedy)
    return Finding("GPU", Verdict.OK, f"{found}; use it with --device cuda")


def compiler() -> Finding:
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return Finding("C compiler", Verdict.OK, path)
    return Finding(
        "C compiler", Verdict.NOTE, "none; torch.compile needs one", "sudo apt-get install build-essential"
    )


def port(host: str, number: int, flag: str) -> Finding:
    subject = f"port {number}"
    try:
        claim_port(host, number, flag)
    except CannotStart as error:
        return Finding(
            subject, Verdict.NOTE, error.message, f"stop what uses it, or give `baton up` another {flag}"
        )
    return Finding(subject, Verdict.OK, f"free ({flag})")


def model(settings: Settings) -> Finding:
    name = settings.model.model
    if not name:
        return Finding(
            "model",
            Verdict.NOTE,
            "none comes with this install",
            "give --model a folder or a Hugging Face id",
        )
    if not Path(name).expanduser().is_dir() and "/" in name and not name.startswith(("/", ".", "~")):
        return Finding("model", Verdict.OK, f"{name} (from Hugging Face at first use)")
    try:
        folder = model_folder(name)
    except BatonError as error:
        return Finding("model", Verdict.FAIL, error.message, "give --model a folder in Hugging Face layout")
    return Finding("model", Verdict.OK, str(folder))


def base_install() -> Finding | None:
    """Says so where workers cannot run because their libraries are not installed."""
    missing = [name for name in ("torch", "nixl", "safetensors") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return Finding(
        "workers",
        Verdict.NOTE,
        f"base install ({', '.join(missing)} not installed): router, kvstore, chat and config work here",
        "to run workers: pip install 'baton-serve[worker]'",
    )


def _nvidia_smi() -> list[str]:
    """Name, driver version and memory of each GPU; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [f"{row[0]}, driver {row[1]}, {row[2]}" for row in rows if len(row) == 3]


def _limit(value: int, unit: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value} {unit}".strip()
