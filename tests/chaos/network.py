"""How a process's network is cut and healed, without privileges and without the process taking part.

`pidfd_getfd` gives a parent the sockets of its children. A filter that drops everything makes one deaf, as if
the cable were pulled: nobody is told, TCP sends again until it gives up or is healed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

_PIDFD_GETFD = 438
_ATTACH_FILTER, _DETACH_FILTER = 26, 27
_RETURN = 0x06
_AGAIN_S = 0.05
_libc = ctypes.CDLL(None, use_errno=True)

# One instruction: of every packet keep 0 bytes.
_DROP = ctypes.create_string_buffer(struct.pack("HBBI", _RETURN, 0, 0, 0))
_DROP_EVERYTHING = struct.pack("HP", 1, ctypes.addressof(_DROP))


async def cut(
    pid: int, seconds: float, others: Callable[[], Iterable[int]], *, deaf: bool, mute: bool
) -> None:
    """For so long nothing reaches the process (`deaf`) and nothing it sends reaches `others` (`mute`).

    Connections made meanwhile are cut too, within a few hundredths of a second.
    """
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            _deafen_all(pid, others() if mute else (), deaf)
            await asyncio.sleep(_AGAIN_S)
    finally:
        # Of everybody, whoever they were connected to: the other end may have given the connection up, and a
        # socket that stays deaf would look like a fault of the process that has it.
        for one in {pid, *others()}:
            with _sockets(one) as sockets:
                for each in sockets:
                    _heal(each)


def reset(pid: int, *, only_ipv4: bool = False) -> None:
    """End every TCP connection of the process, as both of its ends see it.

    With `only_ipv4` those over which KV is read: gRPC's sockets are of IPv6, whatever it speaks.
    """
    with _sockets(pid) as sockets:
        for one in sockets:
            if not (only_ipv4 and one.family != socket.AF_INET) and _peer(one) is not None:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


def _deafen_all(pid: int, others: Iterable[int], deaf: bool) -> None:
    """Let no packet to the process through if it is `deaf`, and none from it to `others`."""
    with _sockets(pid) as own:
        ends = {(_own(one), peer) for one in own if (peer := _peer(one)) is not None}
        for one in own if deaf else ():
            _deafen(one)
    for other in others:
        if other != pid:
            with _sockets(other) as theirs:
                for one in theirs:
                    if (_peer(one), _own(one)) in ends:
                        _deafen(one)


def _deafen(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, _DROP_EVERYTHING)


def _heal(one: socket.socket) -> None:
    with suppress(FileNotFoundError):  # it had no filter
        one.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)


def _own(one: socket.socket) -> tuple[str, int]:
    return _plain(one.getsockname())


def _plain(address: tuple[Any, ...]) -> tuple[str, int]:
    """Host and port: gRPC speaks IPv4 over sockets of IPv6, whose addresses have more to them."""
    return str(address[0]).removeprefix("::ffff:"), int(address[1])


def _peer(one: socket.socket) -> tuple[str, int] | None:
    """Where a connected socket leads; None of one that listens or is not connected any more."""
    with suppress(OSError):
        if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return _plain(one.getpeername())
    return None


@contextmanager
def _sockets(pid: int) -> Iterator[list[socket.socket]]:
    """The TCP sockets of a process, shared with it for a moment only: they must close when it does. None
    when it is gone."""
    with ExitStack() as stack:
        found = []
        with suppress(ProcessLookupError, FileNotFoundError):
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
                one = _taken(pidfd, entry)
                if one is not None:
                    stack.callback(one.close)
                    if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                        found.append(one)
        yield found


def _taken(pidfd: int, entry: Path) -> socket.socket | None:
    """The socket behind one entry of a process's table of files; None when it is something else or gone."""
    try:
        if not entry.readlink().name.startswith("socket:"):
            return None
    except OSError:
        return None
    number = _libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
    if number < 0:
        error = ctypes.get_errno()
        if error == 1:
            raise PermissionError("pidfd_getfd is forbidden here: containers need CAP_SYS_PTRACE for it")
        return None
    return socket.socket(fileno=number)
