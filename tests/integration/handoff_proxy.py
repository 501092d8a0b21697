"""A stand-in for a prefill worker that passes everything on to the real one, and can fail at any message."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from baton.rpc.v1 import worker_pb2, worker_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Moment = tuple[str, int]
"""The n-th message of a kind on a handoff, from 1, such as ("blocks_ready", 2)."""

Before = Callable[[Moment, Any], Awaitable[None]]


_SETTLE_S = 10.0


class Cut(Exception):
    """The connection ends here: the message and all after it are lost, for both sides."""


class HandoffProxy(worker_pb2_grpc.KvServicer):
    """Serves Kv in the name of the worker at `to`.

    `before` is called with every message and its moment before that is passed on; it may take its time,
    change the message, and raise `Cut`. After the message of the moment `last` the connection ends. When a
    reader vanishes its connection does, unless `half_open` is set: then the worker does not see it end before
    that event. KV does not pass through: readers read the worker itself.
    """

    def __init__(self, to: str) -> None:
        self.address = ""
        self.before: Before = _nothing
        self.last: Moment | None = None
        self.half_open: asyncio.Event | None = None
        self.seen: list[Moment] = []
        self._to = to

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[HandoffProxy]:
        server = grpc.aio.server()
        worker_pb2_grpc.add_KvServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(0)

    async def Connect(
        self, request: worker_pb2.ConnectRequest, context: Context
    ) -> worker_pb2.ConnectResponse:
        async with grpc.aio.insecure_channel(self._to) as channel:
            description: worker_pb2.ConnectResponse = await worker_pb2_grpc.KvStub(channel).Connect(request)
        return description

    async def Handoff(
        self, request_iterator: AsyncIterator[worker_pb2.HandoffRequest], context: Context
    ) -> None:
        relaying = asyncio.create_task(self._relay(request_iterator, context))
        try:
            await asyncio.shield(relaying)
        finally:
            if self.half_open is not None:
                await self.half_open.wait()
                await asyncio.wait([relaying], timeout=_SETTLE_S)
            relaying.cancel()
            await asyncio.gather(relaying, return_exceptions=True)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the stand-in's connection has ended")

    async def _relay(
        self, request_iterator: AsyncIterator[worker_pb2.HandoffRequest], context: Context
    ) -> None:
        counts: Counter[str] = Counter()

        async def passed_on(message: Any, write: Callable[[Any], Awaitable[None]]) -> None:
            kind = message.WhichOneof("message")
            counts[kind] += 1
            moment = (kind, counts[kind])
            self.seen.append(moment)
            await self.before(moment, message)
            await write(message)
            if moment == self.last:
                raise Cut

        async with grpc.aio.insecure_channel(self._to) as channel:
            call = worker_pb2_grpc.KvStub(channel).Handoff()

            async def down() -> None:
                async for request in request_iterator:
                    await passed_on(request, call.write)

            try:
                async with asyncio.TaskGroup() as tasks:
                    asking = tasks.create_task(down())
                    async for response in call:
                        await passed_on(response, context.write)
                    asking.cancel()
            except* (Cut, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                call.cancel()


async def _nothing(moment: Moment, message: Any) -> None:
    """Pass it on."""
