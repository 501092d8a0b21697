"""What routers have promised to workers, passed on between routers for as long as their streams last.

Kept in the kvstore's memory and never in Redis: a promise lives for milliseconds, and ends with its
router's stream, which this kvstore holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.errors import BatonError, InvalidRequest, Overloaded
from baton.rpc.reservations import MAX_RESERVATIONS
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_ROUTERS = 256
_MAX_NAME = 256


class _Router:
    """One open stream: what its router has promised, and what it has yet to hear of the others'."""

    def __init__(self, latest: kvstore_pb2.RouterReservations) -> None:
        self.latest = latest
        self._waiting: dict[str, kvstore_pb2.RouterReservations] = {}
        self._arrived = asyncio.Event()

    def offer(self, message: kvstore_pb2.RouterReservations) -> None:
        """Queue a message in place of an older one of the same router, so never more than routers."""
        self._waiting[message.router_id] = message
        self._arrived.set()

    async def next(self) -> list[kvstore_pb2.RouterReservations]:
        """Everything that waits, waiting for something as long as it takes."""
        await self._arrived.wait()
        self._arrived.clear()
        waiting, self._waiting = self._waiting, {}
        return list(waiting.values())


class ReservationsServicer(kvstore_pb2_grpc.ReservationsServicer):
    """baton.v1.Reservations. A router that opens a second stream speaks through that one only."""

    def __init__(self) -> None:
        self._routers: dict[str, _Router] = {}

    @property
    def routers(self) -> int:
        """Routers that share their reservations now."""
        return len(self._routers)

    async def Share(
        self, request_iterator: AsyncIterator[kvstore_pb2.RouterReservations], context: Context
    ) -> AsyncIterator[kvstore_pb2.RouterReservations]:
        try:
            first = await anext(request_iterator, None)
            if first is None:
                return
            router = self._enter(first)
            router_id = first.router_id
            taking = asyncio.create_task(self._take(router_id, router, request_iterator))
            try:
                yield kvstore_pb2.RouterReservations()
                while not taking.done():
                    arrived = asyncio.create_task(router.next())
                    try:
                        await asyncio.wait({taking, arrived}, return_when=asyncio.FIRST_COMPLETED)
                        if arrived.done():
                            for message in arrived.result():
                                yield message
                    finally:
                        arrived.cancel()
                taking.result()
            finally:
                taking.cancel()
                self._leave(router_id, router)
        except BatonError as error:
            await context.abort(error.grpc_code, error.message)

    def _enter(self, first: kvstore_pb2.RouterReservations) -> _Router:
        _check(first)
        if first.router_id not in self._routers and len(self._routers) >= _MAX_ROUTERS:
            raise Overloaded(f"{_MAX_ROUTERS} routers share reservations already", retry_after_s=60.0)
        router = self._routers[first.router_id] = _Router(first)
        for other in self._routers.values():
            if other is not router:
                router.offer(other.latest)
                other.offer(first)
        return router

    async def _take(
        self, router_id: str, router: _Router, messages: AsyncIterator[kvstore_pb2.RouterReservations]
    ) -> None:
        async for message in messages:
            _check(message)
            if message.router_id != router_id:
                raise InvalidRequest("router_id: one Share stream carries one router", field="router_id")
            if self._routers.get(router_id) is not router:
                return
            router.latest = message
            self._tell_others(router, message)

    def _leave(self, router_id: str, router: _Router) -> None:
        if self._routers.get(router_id) is router:
            del self._routers[router_id]
            self._tell_others(router, kvstore_pb2.RouterReservations(router_id=router_id))

    def _tell_others(self, router: _Router, message: kvstore_pb2.RouterReservations) -> None:
        for other in self._routers.values():
            if other is not router:
                other.offer(message)


def _check(message: kvstore_pb2.RouterReservations) -> None:
    """
    Raises:
        InvalidRequest: the router has no usable name, or names too many workers.
    """
    if not 0 < len(message.router_id) <= _MAX_NAME:
        raise InvalidRequest(f"router_id must have 1 to {_MAX_NAME} characters", field="router_id")
    if len(message.reservations) > MAX_RESERVATIONS:
        raise InvalidRequest(f"reservations: at most {MAX_RESERVATIONS} workers", field="reservations")
