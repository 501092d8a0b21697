"""One HTTP exchange: reading the request within bounds, writing the answer, noticing that the client left."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import orjson

from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestTooLarge,
    Unauthenticated,
)
from baton.openai.answer import error_shape
from baton.security.access import ANYONE, Grant

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Mapping[str, str]

_BODY_TIMEOUT_S = 60.0
_MAX_REQUEST_ID = 128
_LONGEST_RETRY_S = 3600


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


class NotFound(InvalidRequest):
    """No such path."""

    http_status = 404


class MethodNotAllowed(InvalidRequest):
    """The path is there, for other methods."""

    http_status = 405

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class UnsupportedMediaType(InvalidRequest):
    """The body is not JSON, or is compressed."""

    http_status = 415


class BodyTooSlow(InvalidRequest):
    """The body did not arrive in time."""

    http_status = 408


class Connection:
    """Whether the client is still there. An exchange that must know at once sets `on_lost`."""

    def __init__(self) -> None:
        self.lost = False
        self.on_lost: Callable[[], None] | None = None

    def lose(self) -> None:
        """The client has closed its connection."""
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


class Exchange:
    """One request and its response, of which exactly one is written."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: str = scope["query_string"].decode("latin-1")
        # Of a header given twice the first counts.
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        self._connection: Connection = scope["state"]["connection"]
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self.request_id = _usable(self.header("x-request-id")) or os.urandom(16).hex()
        self.started = False
        self.grant: Grant = ANYONE

    def header(self, name: str) -> str:
        """A request header by its lower-case name; empty when absent."""
        return self._headers.get(name.encode(), b"").decode("latin-1")

    async def json_body(self) -> bytes:
        """The whole body, which the headers say is JSON.

        Raises:
            UnsupportedMediaType, RequestTooLarge, BodyTooSlow, ClientGone
        """
        content_type = self.header("content-type").partition(";")[0].strip().lower()
        if content_type not in ("", "application/json"):
            raise UnsupportedMediaType(
                f"content-type: {content_type[:64]!r} is not accepted; send application/json",
                field="content-type",
            )
        encoding = self.header("content-encoding").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType(
                f"content-encoding: {encoding[:64]!r} is not accepted; send the body uncompressed",
                field="content-encoding",
            )
        length = self.header("content-length")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                return await self._read()
        except TimeoutError:
            raise BodyTooSlow(f"body: not complete after {_BODY_TIMEOUT_S:.0f} s", field="body") from None

    async def _read(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_body_bytes:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"body: larger than {self._max_body_bytes} bytes; shorten it or raise --max-body-bytes",
            field="body",
        )

    @asynccontextmanager
    async def while_connected(self, limit_s: float) -> AsyncIterator[None]:
        """Cancel what is inside when the client leaves or `limit_s` seconds have passed. After the body.

        Raises:
            ClientGone: the client left.
            DeadlineExceeded: the time is over.
        """
        connection = self._connection
        if connection.lost:
            raise ClientGone
        try:
            async with asyncio.timeout(limit_s) as scope:

                def give_up() -> None:
                    if not scope.expired():
                        scope.reschedule(0.0)

                connection.on_lost = give_up
                try:
                    yield
                finally:
                    connection.on_lost = None
        except TimeoutError:
            if not scope.expired():
                raise
            if connection.lost:
                raise ClientGone from None
            raise DeadlineExceeded(
                f"the answer was not complete after {limit_s:g} s (--request-timeout-s, x-request-timeout)"
            ) from None

    async def respond(
        self, status: int, body: bytes, content_type: str, headers: Headers | None = None
    ) -> None:
        """Write the whole response."""
        await self._start(
            status, {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
        )
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def json(self, status: int, content: object, headers: Headers | None = None) -> None:
        await self.respond(status, orjson.dumps(content), "application/json", headers)

    async def start_events(self, headers: Headers) -> None:
        """Begin a response of server-sent events."""
        await self._start(
            200,
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                # nginx would gather events and pass them on late.
                "x-accel-buffering": "no",
                **headers,
            },
        )

    async def events(self, events: bytes, *, last: bool) -> None:
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})

    async def error(self, error: BatonError) -> None:
        """Write an error as the whole response."""
        headers = {}
        if isinstance(error, Overloaded):
            headers["retry-after"] = str(retry_after(error))
        if isinstance(error, MethodNotAllowed):
            headers["allow"] = error.allowed
        if isinstance(error, Unauthenticated):
            headers["www-authenticate"] = "Bearer"
        await self.json(error.http_status, error_shape(error), headers)

    async def _start(self, status: int, headers: Headers) -> None:
        self.started = True
        raw = [
            (name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()
        ]
        raw.append((b"x-request-id", self.request_id.encode("latin-1")))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


def retry_after(error: Overloaded) -> int:
    """Whole seconds for the header of that name."""
    return min(_LONGEST_RETRY_S, max(1, math.ceil(error.retry_after_s)))


def _usable(request_id: str) -> str:
    """A client's own request id, if it is fit for logs and headers."""
    fit = len(request_id) <= _MAX_REQUEST_ID and request_id.isascii() and request_id.isprintable()
    return request_id if fit else ""
