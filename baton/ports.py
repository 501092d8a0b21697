"""Which TCP port may a process listen on that has not started yet?"""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
_TRIES = 200
_claims: list[socket.socket] = []


def unused_port(host: str) -> int:
    """A port on which nothing listens, and that the kernel gives to no outgoing connection meanwhile.

    Binding port 0 would give one of the ports that outgoing connections are drawn from: it may be
    taken again before the process that is to listen on it has started. Nor does another process that asks
    here get the same port, as long as this one lives.

    Raises:
        OSError: `host` is not this machine, or no port is left.
    """
    for _ in range(_TRIES):
        port = random.randrange(_LOWEST, _first_ephemeral())
        try:
            check_free(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            if _claim(port):
                return port
    raise OSError(errno.EADDRINUSE, f"{_TRIES} ports on {host} are all in use")


def check_free(host: str, port: int) -> None:
    """Raises OSError when nobody could listen on `host`:`port` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)


def _claim(port: int) -> bool:
    """Take a name of the port's in the kernel's abstract namespace: one process has it, until it ends."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0baton-port-{port}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True


def _first_ephemeral() -> int:
    try:
        lowest = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError):
        lowest = 32_768
    return lowest if lowest > _LOWEST else 65_536
