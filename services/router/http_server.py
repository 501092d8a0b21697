"""How the app is served: uvicorn on a socket of ours, stopped by us."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from baton.addresses import join
from baton.config import BadSetting
from baton.errors import InvalidRequest
from baton.openai.answer import error_shape
from services.router.http import Connection

_KEEP_ALIVE_S = 75
_BACKLOG = 2048
_MAX_HEAD_BYTES = 64 * 1024
_LINGER_S = 1.0


class _Gathering:
    """A transport that sends in one piece what was written within one turn of the loop, such as the head
    of a response and its first event: each send costs more than all the rest of a token."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._written: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def write_eof(self) -> None:
        self._flush()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._written:
            written, self._written = self._written, []
            self._transport.write(b"".join(written))


class HeadTooLarge(InvalidRequest):
    """The request's line and headers are larger than is read."""

    http_status = 431


class HeadTooSlow(InvalidRequest):
    """The request's line and headers did not arrive in time."""

    http_status = 408


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with errors in OpenAI's shape, and no patience for connections that never speak, or never
    come to the end of a request's head."""

    head_timeout_s: float

    def connection_made(self, transport: Any) -> None:
        self._connection = Connection()
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._refused = False
        super().connection_made(_Gathering(transport, self.loop))  # type: ignore[arg-type]
        # Else every second small write waits for an acknowledgement; the loops set it on some sockets only.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(f"headers: larger than {_MAX_HEAD_BYTES} bytes", field="headers"))
                return
        # Also empty lines before a head, and the rest of a body that was refused, come to an end.
        waiting = self._in_head or self.cycle is None or self.cycle.response_complete
        if waiting and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self.scope["state"]["connection"] = self._connection

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._forget_head_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_head_timer()
        self._connection.lose()

    def _head_late(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # Behind a request that is still answered; what is there of the next one can wait as long.
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_late)
            return
        if self._in_head:
            late = f"headers: not complete after {self.head_timeout_s:g} s"
            self._refuse(HeadTooSlow(late, field="headers"))
        else:
            self.transport.close()

    def _forget_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(f"not HTTP: {msg}"))

    def _refuse(self, error: InvalidRequest) -> None:
        """Answer and hang up. What still comes is read and forgotten for a moment: a connection closed with
        something unread takes the answer with it."""
        self._refused = True
        self._forget_head_timer()
        body = orjson.dumps(error_shape(error))
        head = (
            f"HTTP/1.1 {error.http_status} {HTTPStatus(error.http_status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(_LINGER_S, self.transport.close)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling: the process decides when to stop."""

    def __init__(
        self, app: Any, *, grace_s: float, head_timeout_s: float, tls: ssl.SSLContext | None = None
    ) -> None:
        """
        Args:
            grace_s: seconds running requests get once `stop` was called; then they are cancelled.
            head_timeout_s: seconds until a request's headers must have arrived.
        """
        protocol = type("Protocol", (_Protocol,), {"head_timeout_s": head_timeout_s})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ssl_context_factory=None if tls is None else lambda _config, _default: tls,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(grace_s),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Make `serve` close the listening socket, wait for running requests, and return."""
        self.should_exit = True


def listen(host: str, port: int, *, flag: str, share: bool = False) -> socket.socket:
    """A TCP socket that listens as soon as it is served; port 0 takes any free one.

    Args:
        flag: the flag that chose the port, such as `--port`, for the message.
        share: other processes that also say so may listen on the same port (SO_REUSEPORT).

    Raises:
        BadSetting: the port is taken, or the host is not an address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if not share:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        # One that listened already would be given connections that nobody takes yet.
        shared = socket.socket(family, socket.SOCK_STREAM)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind((host, port))
        return shared
    except OSError as error:
        raise BadSetting(
            f"cannot listen on {join(host, port)} ({flag}): {error.strerror or error}; choose another {flag}",
            field=flag.removeprefix("--").replace("-", "_"),
        ) from error
