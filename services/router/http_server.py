"""How the app is served: uvicorn on a socket of ours, stopped by us."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from baton.config import BadSetting
from baton.errors import InvalidRequest
from baton.openai.answer import error_shape
from services.router.http import Connection

_KEEP_ALIVE_S = 75
_BACKLOG = 2048


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

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._written:
            written, self._written = self._written, []
            self._transport.write(b"".join(written))


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with errors in OpenAI's shape and no patience for connections that never speak."""

    def connection_made(self, transport: Any) -> None:
        self._connection = Connection()
        super().connection_made(_Gathering(transport, self.loop))  # type: ignore[arg-type]
        # Else every second small write waits for an acknowledgement; the loops set it on some sockets only.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["connection"] = self._connection

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connection.lose()

    def send_400_response(self, msg: str) -> None:
        body = orjson.dumps(error_shape(InvalidRequest(f"not HTTP: {msg}")))
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling: the process decides when to stop."""

    def __init__(self, app: Any, *, grace_s: float) -> None:
        """`grace_s`: seconds running requests get once `stop` was called; then they are cancelled."""
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
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
    """A listening TCP socket; port 0 takes any free one.

    Args:
        flag: the flag that chose the port, such as `--port`, for the message.
        share: other processes that also say so may listen on the same port (SO_REUSEPORT).

    Raises:
        BadSetting: the port is taken, or the host is not an address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=share)
    except OSError as error:
        raise BadSetting(
            f"cannot listen on {host}:{port} ({flag}): {error.strerror or error}; choose another {flag}",
            field=flag.removeprefix("--").replace("-", "_"),
        ) from error
