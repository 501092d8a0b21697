"""Can the cluster start here? Each check fails in one sentence before any process is started."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from baton.addresses import join
from baton.errors import BatonError
from baton.machine import available_bytes
from baton.ports import check_free, unused_port

_BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}
_GIB = 1024**3


class CannotStart(BatonError):
    """This machine, as it is now, cannot run the cluster; the message says why and what to change."""


def claim_port(host: str, port: int, flag: str) -> int:
    """A port that is free now: `port`, or any when it is 0.

    Raises:
        CannotStart: the port is in use or may not be used, or the host is not this machine.
    """
    try:
        if port == 0:
            return unused_port(host)
        check_free(host, port)
        return port
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CannotStart(
                f"port {port} on {host} is in use; stop what listens there or choose another with {flag}"
            ) from error
        raise CannotStart(
            f"cannot listen on {join(host, port)} ({flag}): {error.strerror or error}"
        ) from error


def check_memory(folder: Path, dtype: str, workers: int, kv_bytes: int) -> None:
    """Refuse a cluster whose weights and KV cannot fit in this machine's free memory.

    Args:
        folder: of the model.
        dtype: of the weights in memory, or `auto` for float32.
        kv_bytes: of each worker's KV pool, 0 when the worker chooses, and of its host tier.

    Raises:
        CannotStart: says how much is needed and how much there is.
    """
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    stored_dtype = json.loads((folder / "config.json").read_text())
    stored_dtype = stored_dtype.get("dtype") or stored_dtype.get("torch_dtype") or "float32"
    held = _BYTES_PER_VALUE.get("float32" if dtype == "auto" else dtype, 4)
    each = stored * held // _BYTES_PER_VALUE.get(str(stored_dtype), held) + kv_bytes
    available = available_bytes()
    if workers * each > available:
        raise CannotStart(
            f"too little memory: {workers} workers need {workers * each / _GIB:.1f} GiB for weights and KV, "
            f"and {available / _GIB:.1f} GiB is free; start fewer workers, or choose --dtype bfloat16 or "
            "less --kv-bytes or --kv-host-bytes"
        )
