"""Compiled CPU kernels: building native.cpp once per machine, and calling it on tensors.

Where there is no compiler, or the processor lacks AVX512-BF16, `library` is None and torch's operators
do the work: a little slower, and as independent of batch, chunks and threads.

`python -m baton.models.native` builds them beside the source instead, for every processor that can run
them: so an image has them without a compiler in it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from hashlib import blake2b
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
_THIS_PROCESSOR = ("-march=native",)
_ANY_PROCESSOR = ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512")
#: What x86-64-v4 and AVX512-BF16 are among the processor's flags; the rest is older than these.
_NEEDED = {b"avx512f", b"avx512bw", b"avx512cd", b"avx512dq", b"avx512vl", b"avx512_bf16"}
_COMPILE_DEADLINE_S = 120.0
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
#: Outputs that a product computes together; oneDNN packs weights in panels of as many.
PANEL = 64
#: Above so many rows oneDNN is as fast.
MOST_ROWS = 256

_ARGUMENTS: dict[str, list[type]] = {
    "linear": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "norm": [c_void_p, *[c_int64] * 5, c_void_p, c_float, c_int, c_void_p, c_int],
    "gate": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int],
    "rotate": [c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int],
    "add": [c_void_p, c_void_p, c_int64, c_int64, c_int],
    "attend": [c_void_p, c_int],
    "stack": [c_void_p, c_int64, c_void_p, c_void_p, c_int],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had. The first call on a machine compiles."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        log.info("no compiled kernels, torch computes: %s", (output or str(error)).strip().splitlines()[0])
        return None
    for name, arguments in _ARGUMENTS.items():
        for dtype in _DTYPES.values():
            function = getattr(loaded, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, None
    return loaded


def kernel(name: str, like: torch.Tensor) -> ctypes._NamedFuncPointer | None:
    """The kernel `name` for tensors like `like`; None where torch must compute."""
    if like.device.type != "cpu" or like.dtype not in _DTYPES:
        return None
    loaded = library()
    return None if loaded is None else getattr(loaded, f"{name}_{_DTYPES[like.dtype]}")


def _compiled() -> Path:
    """The shared library of this source on this processor: shipped, from the cache or compiled into it."""
    if _shipped().exists() and _NEEDED.issubset(_processor().split()):
        return _shipped()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"
    target = folder / _name(_compiler().encode(), *map(str.encode, _THIS_PROCESSOR), _processor())
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            _compile(built, _THIS_PROCESSOR)
            built.replace(target)  # whole or not at all: other workers may be starting too
    return target


def _shipped() -> Path:
    return _SOURCE.with_name(_name(*map(str.encode, _ANY_PROCESSOR)))


def _name(*parts: bytes) -> str:
    """The file that holds what is compiled of this source under the conditions in `parts`."""
    key = blake2b(digest_size=12)
    for part in (_SOURCE.read_bytes(), repr(_FLAGS).encode(), *parts):
        key.update(part)
    return f"native-{key.hexdigest()}.so"


def _compile(target: Path, architecture: tuple[str, ...]) -> None:
    subprocess.run(
        [_compiler(), *_FLAGS, *architecture, "-o", str(target), str(_SOURCE)],
        check=True,
        capture_output=True,
        text=True,
        timeout=_COMPILE_DEADLINE_S,
    )


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _processor() -> bytes:
    """What the processor can do, as the kernel lists it."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


if __name__ == "__main__":
    _compile(_shipped(), _ANY_PROCESSOR)
