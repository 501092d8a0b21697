"""How a worker makes itself known to the kvstore: membership, load, and the blocks it holds."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import TypeAlias

import grpc

from baton.kv.events import Cleared, Event, WorkerEvents, pack
from baton.rpc.channels import open_channel
from baton.rpc.kvstore_messages import MAX_BLOCKS, MAX_EVENTS, encode_events
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc, worker_pb2

log = logging.getLogger(__name__)

Join: TypeAlias = "grpc.aio.StreamStreamCall[kvstore_pb2.Beat, kvstore_pb2.JoinReply]"
Publish: TypeAlias = "grpc.aio.StreamStreamCall[kvstore_pb2.IndexEvents, kvstore_pb2.PublishReply]"

REPLY_TIMEOUT_S = 5.0
MAX_PEERS = 1024
_LOAD_INTERVAL_S = 0.05
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 1.0
_REFUSALS = (
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


class ConnectionLost(Exception):
    """The kvstore ended a stream, or one of its streams cannot go on."""


class Retry:
    """Pauses between attempts to reach the kvstore, and one log line per outage instead of per attempt.

    `what` names in the log what is sent to the kvstore at `address`, or heard from it.
    """

    def __init__(self, what: str, address: str) -> None:
        self._what = what
        self._address = address
        self._pause_s = _FIRST_RETRY_S
        self._told = False

    def reached(self) -> None:
        """The kvstore answers."""
        if self._told:
            log.info("%s: the kvstore at %s is back", self._what, self._address)
        self._pause_s, self._told = _FIRST_RETRY_S, False

    @asynccontextmanager
    async def attempt(self) -> AsyncIterator[None]:
        """Run one connection; when the kvstore is lost, say so and pause. Other errors go through."""
        try:
            try:
                yield
            except* asyncio.InvalidStateError as group:  # grpc's answer to a write on a finished stream
                raise ConnectionLost("the stream is closed") from group
        except* (grpc.aio.AioRpcError, ConnectionLost, TimeoutError) as group:
            if not self._told:
                self._told = True
                log.warning(
                    "%s: the kvstore at %s %s, going on without it: %s",
                    self._what,
                    self._address,
                    "refuses" if _refused(group) else "is away",
                    _reason(group),
                )
            await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
            self._pause_s = min(2 * self._pause_s, _LAST_RETRY_S)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _refused(group: BaseException) -> bool:
    error = _first(group)
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _REFUSALS


def _reason(group: BaseException) -> str:
    error = _first(group)
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or "no answer in time"


class _Bell:
    """An asyncio.Event that any thread may set, cheaply when it is set already."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self._rung = False

    def attach(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._rung:
            self._event.set()

    def detach(self) -> None:
        self._loop = None

    def ring(self) -> None:
        if not self._rung:
            self._rung = True
            loop = self._loop
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()
        self._rung = False


class WorkerMembership:
    """Keeps one worker in the registry and its blocks in the prefix index for as long as `run` runs.

    `publish`, `report` and `change` may be called from any thread and never wait: with the kvstore
    away the worker goes on, and catches up later by events or by a snapshot.

    Args:
        address: the kvstore's host:port.
        worker: what the registry tells others; its incarnation must be new for every process.
        snapshot: gives everything the worker holds. An event published after it was called may be in
            the answer or not; the order of what is published later must be the order of what happened.
        max_buffered_blocks: block ids kept while the kvstore is away; beyond it a snapshot replaces them.
    """

    def __init__(
        self,
        address: str,
        worker: kvstore_pb2.Worker,
        snapshot: Callable[[], Awaitable[Sequence[Event]]],
        *,
        max_buffered_blocks: int = 262_144,
    ) -> None:
        self._address = address
        self._snapshot = snapshot
        self._max_buffered_blocks = max_buffered_blocks
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._buffered = 0
        self._resync = False
        self._sequence = 0
        self._events_bell = _Bell()
        self._worker = worker
        self._load = worker_pb2.WorkerLoad()
        self._draining = False
        self._reads: Mapping[str, float] = {}
        self._beat_bell = _Bell()
        self._connected = False

    @property
    def connected(self) -> bool:
        """Whether the worker is in the registry now."""
        return self._connected

    def publish(self, events: Sequence[Event]) -> None:
        """Tell the index what happened in one engine step, in order."""
        if not events:
            return
        with self._lock:
            self._events.extend(events)
            self._buffered += sum(1 if isinstance(e, Cleared) else len(e.block_ids) for e in events)
            if self._buffered > self._max_buffered_blocks:
                self._events, self._buffered, self._resync = [], 0, True
        self._events_bell.ring()

    def report(self, load: worker_pb2.WorkerLoad) -> None:
        """Tell the registry how busy the worker is; the latest report counts."""
        self._load = load
        self._beat_bell.ring()

    def report_reads(self, bytes_per_s: Mapping[str, float]) -> None:
        """Tell the registry how fast reads from other workers were, by their ids; the latest report counts.

        It travels with every beat: keep to the peers that were read from lately, `MAX_PEERS` at most.
        """
        self._reads = dict(islice(bytes_per_s.items(), MAX_PEERS))
        self._beat_bell.ring()

    def change(self, *, worker: kvstore_pb2.Worker | None = None, draining: bool | None = None) -> None:
        """Tell the registry at once that the worker's description or its draining has changed."""
        if worker is not None:
            self._worker = worker
        if draining is not None:
            self._draining = draining
        self._beat_bell.ring()

    async def run(self) -> None:
        """Stay in touch with the kvstore until cancelled, which takes the worker out of the registry."""
        self._events_bell.attach()
        self._beat_bell.attach()
        retry = Retry("membership", self._address)
        try:
            async with open_channel(self._address) as channel:
                while True:
                    async with retry.attempt():
                        await self._connection(channel, retry)
        finally:
            self._events_bell.detach()
            self._beat_bell.detach()

    async def _connection(self, channel: grpc.aio.Channel, retry: Retry) -> None:
        """Join, then send beats and events until one of the streams fails."""
        join: Join = kvstore_pb2_grpc.RegistryStub(channel).Join(wait_for_ready=True)
        publish: Publish | None = None
        try:
            replies = aiter(join)
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await join.write(self._beat(self._worker))
                reply = await anext(replies, None)
            if reply is None:
                raise ConnectionLost("the kvstore ended the Join stream")
            retry.reached()
            self._connected = True
            # Only a member may publish, so this stream waits for the reply on the other.
            publish = kvstore_pb2_grpc.PrefixIndexStub(channel).Publish()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send_beats(join, reply.ttl_s))
                tasks.create_task(self._until_end(replies))
                tasks.create_task(self._send_events(publish))
                tasks.create_task(self._heed_resyncs(publish))
        finally:
            self._connected = False
            join.cancel()
            if publish is not None:
                publish.cancel()

    def _beat(self, worker: kvstore_pb2.Worker | None) -> kvstore_pb2.Beat:
        return kvstore_pb2.Beat(
            worker=worker, load=self._load, draining=self._draining, read_bytes_per_s=self._reads
        )

    async def _send_beats(self, join: Join, ttl_s: float) -> None:
        told = self._worker
        while True:
            # News goes out at once, but a load that changes with every step not with every step.
            await asyncio.sleep(_LOAD_INTERVAL_S)
            try:
                async with asyncio.timeout(ttl_s / 3):
                    await self._beat_bell.wait()
            except TimeoutError:
                pass
            worker = self._worker
            async with asyncio.timeout(ttl_s):
                await join.write(self._beat(None if worker is told else worker))
            told = worker

    async def _send_events(self, publish: Publish) -> None:
        # The next message, saying nothing: the kvstore's answer tells whether it has all before it.
        await self._send(publish, ((),), snapshot=False)
        while True:
            await self._events_bell.wait()
            with self._lock:
                events, self._events, self._buffered = self._events, [], 0
                resync, self._resync = self._resync, False
            if resync:
                # What was buffered until now is in the snapshot. Should that be lost on its way, the
                # number left out here keeps the kvstore from believing that it has everything.
                self._sequence += 1
                events = list(await self._snapshot())
            if events or resync:
                await self._send(publish, tuple(pack(events, MAX_BLOCKS, MAX_EVENTS)), snapshot=resync)

    async def _send(self, publish: Publish, pieces: Sequence[tuple[Event, ...]], snapshot: bool) -> None:
        # All are numbered before the first is sent, so that losing any of them leaves a gap.
        first = self._sequence + 1
        self._sequence += len(pieces)
        worker_id, incarnation = self._worker.worker_id, self._worker.incarnation
        for index, piece in enumerate(pieces):
            message = WorkerEvents(worker_id, incarnation, first + index, snapshot and index == 0, piece)
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await publish.write(encode_events(message))

    async def _heed_resyncs(self, publish: Publish) -> None:
        async for reply in publish:
            if reply.resync:
                with self._lock:
                    self._resync = True
                self._events_bell.ring()
        raise ConnectionLost("the kvstore ended the Publish stream")

    async def _until_end(self, replies: AsyncIterator[kvstore_pb2.JoinReply]) -> None:
        async for _ in replies:
            pass
        raise ConnectionLost("the kvstore ended the Join stream")
