"""What the other routers have promised to workers, so that several routers do not all choose the same one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import grpc

from baton.rpc.channels import open_channel
from baton.rpc.kvstore_client import REPLY_TIMEOUT_S, ConnectionLost, Retry
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc

MAX_RESERVATIONS = 10_000
"""Workers that one router's message may name; more are refused."""

_COALESCE_S = 0.005

Share: TypeAlias = "grpc.aio.StreamStreamCall[kvstore_pb2.RouterReservations, kvstore_pb2.RouterReservations]"


class Reserved(NamedTuple):
    """Work promised to one worker that it does not report yet."""

    requests: int = 0
    queued_tokens: int = 0
    blocks: int = 0


class SharedReservations:
    """Tells the other routers what this one has promised, and sums up what they have, while `run` runs.

    Use it on the loop that `run` runs on. With the kvstore away there is nothing from the others, which
    is what one router alone sees; promises are short-lived, so old ones would be worth less than none.

    Args:
        address: the kvstore's host:port.
        router_id: a name that no other router has.
    """

    def __init__(self, address: str, router_id: str) -> None:
        self._address = address
        self._router_id = router_id
        self._mine: Mapping[str, tuple[int, int, int]] = {}
        self._changed = asyncio.Event()
        self._theirs: dict[str, Sequence[kvstore_pb2.Reservation]] = {}
        self._sums: dict[str, Reserved] = {}

    def publish(self, totals: Mapping[str, tuple[int, int, int]]) -> None:
        """Share `totals`: requests, queued tokens and blocks by worker id, all that is promised now.

        Costs nothing but a note: the mapping is read when the next message goes out, at most one every
        few milliseconds, so it may be one that goes on changing.
        """
        self._mine = totals
        self._changed.set()

    def others(self) -> Mapping[str, Reserved]:
        """What all other routers together have promised, by worker id; workers without are left out."""
        return MappingProxyType(self._sums)

    async def run(self) -> None:
        """Stay in touch with the kvstore until cancelled, which ends this router's reservations."""
        retry = Retry("reservations", self._address)
        async with open_channel(self._address) as channel:
            while True:
                async with retry.attempt():
                    await self._connection(channel, retry)

    async def _connection(self, channel: grpc.aio.Channel, retry: Retry) -> None:
        share: Share = kvstore_pb2_grpc.ReservationsStub(channel).Share(wait_for_ready=True)
        try:
            replies = aiter(share)
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await share.write(self._message())
                # The kvstore greets with a message of nobody's, so that its absence is noticed.
                if await anext(replies, None) is None:
                    raise ConnectionLost("the kvstore ended the Share stream")
            retry.reached()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send(share))
                tasks.create_task(self._take(replies))
        finally:
            self._theirs.clear()
            self._sums = {}
            share.cancel()

    def _message(self) -> kvstore_pb2.RouterReservations:
        self._changed.clear()
        promised = ((worker_id, work) for worker_id, work in self._mine.items() if any(work))
        return kvstore_pb2.RouterReservations(
            router_id=self._router_id,
            reservations=[
                kvstore_pb2.Reservation(
                    worker_id=worker_id,
                    requests=max(0, requests),
                    queued_tokens=max(0, queued_tokens),
                    blocks=max(0, blocks),
                )
                for worker_id, (requests, queued_tokens, blocks) in islice(promised, MAX_RESERVATIONS)
            ],
        )

    async def _send(self, share: Share) -> None:
        while True:
            await self._changed.wait()
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await share.write(self._message())
            await asyncio.sleep(_COALESCE_S)

    async def _take(self, replies: AsyncIterator[kvstore_pb2.RouterReservations]) -> None:
        async for reply in replies:
            if reply.reservations:
                self._theirs[reply.router_id] = reply.reservations
            else:
                self._theirs.pop(reply.router_id, None)
            self._sums = _summed(self._theirs)
        raise ConnectionLost("the kvstore ended the Share stream")


def _summed(theirs: Mapping[str, Sequence[kvstore_pb2.Reservation]]) -> dict[str, Reserved]:
    sums: dict[str, Reserved] = {}
    for reservations in theirs.values():
        for one in reservations:
            before = sums.get(one.worker_id, Reserved())
            sums[one.worker_id] = Reserved(
                before.requests + one.requests,
                before.queued_tokens + one.queued_tokens,
                before.blocks + one.blocks,
            )
    return sums
