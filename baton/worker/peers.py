"""Which other workers this one can read from: channels, NIXL agents, warm-up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from baton.errors import HandoffFailed
from baton.routing.rates import ReadRates
from baton.rpc.channels import open_channel
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.transfer.base import ReadReport, Transfer
from baton.transfer.verify import require_equal
from baton.transfer.wire import description_from_proto
from baton.worker.metrics import (
    KV_TRANSFER_BLOCKS,
    KV_TRANSFER_BYTES,
    KV_TRANSFER_SECONDS,
    KV_VERIFICATIONS,
    PEER_READ_RATE,
)

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 20.0

HandoffCall: TypeAlias = "grpc.aio.StreamStreamCall[worker_pb2.HandoffRequest, worker_pb2.HandoffResponse]"


@dataclass(frozen=True)
class Peer:
    """A worker this one has read from and can read from again."""

    address: str
    incarnation: str
    agent_name: str
    channel: grpc.aio.Channel
    stub: worker_pb2_grpc.KvStub

    def __str__(self) -> str:
        return f"worker {self.agent_name} at {self.address}"

    @contextmanager
    def handoff(self) -> Iterator[HandoffCall]:
        """A handoff from this worker, which ends with the block.

        Raises:
            HandoffFailed: the worker was forgotten meanwhile. Whoever waits for a call cannot tell the end of
                its channel from being cancelled, and a task that is cancelled tells nobody.
        """
        call = self.stub.Handoff()
        try:
            yield call
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise HandoffFailed(f"{self} was given up meanwhile") from None
        finally:
            call.cancel()


@dataclass
class Peers:
    """Peers by address. Closing it closes their channels."""

    reader_id: str
    transfer: Transfer
    verify: bool = False  # ask for digests of blocks, and compare them with what was read
    read_bytes: int = 0
    _rates: ReadRates[str] = field(default_factory=ReadRates)
    _known: dict[str, Peer] = field(default_factory=dict)
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        transport = self.transfer.describe().transport
        self._bytes = KV_TRANSFER_BYTES.labels(transport)
        self._blocks = KV_TRANSFER_BLOCKS.labels(transport)
        self._seconds = KV_TRANSFER_SECONDS.labels(transport)

    async def get(self, address: str, incarnation: str) -> Peer:
        """The worker at `address`, connected and warm; a restarted one replaces its older self.

        Raises:
            HandoffFailed: it cannot be reached, is another incarnation, or its pool does not fit ours.
        """
        async with self._locks.setdefault(address, asyncio.Lock()):
            known = self._known.get(address)
            if known is not None and known.incarnation == incarnation:
                return known
            if known is not None:
                await self._disconnect(known)
            peer = await self._connect(address, incarnation)
            self._known[address] = peer
            return peer

    async def read(
        self,
        peer: Peer,
        source_blocks: Sequence[int],
        destination_blocks: Sequence[int],
        timeout_s: float,
        digests: Sequence[bytes],
    ) -> ReadReport:
        """Read blocks of the peer into blocks of this worker's pool; ends as `Transfer.read` does.

        `digests` are what the peer named the blocks with.

        Raises:
            HandoffFailed: as `Transfer.read`, or, with `verify`, something else arrived than the peer has.
        """
        report = await self.transfer.read(peer.agent_name, source_blocks, destination_blocks, timeout_s)
        if self.verify:
            await self._verify(peer, source_blocks, destination_blocks, digests)
        self._rate(peer.agent_name, report)
        self.read_bytes += report.bytes
        self._bytes.inc(report.bytes)
        self._blocks.inc(len(destination_blocks))
        self._seconds.observe(report.seconds)
        return report

    async def _verify(
        self, peer: Peer, source: Sequence[int], destination: Sequence[int], digests: Sequence[bytes]
    ) -> None:
        found = await asyncio.to_thread(self.transfer.digests, destination)
        try:
            require_equal(str(peer), source, digests, found)
        except HandoffFailed:
            KV_VERIFICATIONS.labels("failed").inc()
            raise
        KV_VERIFICATIONS.labels("passed").inc()

    def read_rates(self) -> dict[str, float]:
        """Measured bytes per second of reads from each peer, by worker id: a moving average."""
        return self._rates.now()

    def _rate(self, agent_name: str, report: ReadReport) -> None:
        worker_id = agent_name.rpartition("/")[0]
        self._rates.note(worker_id, report.bytes, report.seconds)
        if (rate := self._rates.now().get(worker_id)) is not None:
            PEER_READ_RATE.labels(worker_id).set(rate)

    async def forget(self, address: str, incarnation: str) -> None:
        """Drop what is known of a worker that is gone."""
        async with self._locks.setdefault(address, asyncio.Lock()):
            known = self._known.get(address)
            if known is not None and known.incarnation == incarnation:
                await self._disconnect(known)

    async def close(self) -> None:
        for peer in list(self._known.values()):
            await self._disconnect(peer)

    async def _connect(self, address: str, incarnation: str) -> Peer:
        channel = open_channel(address)
        try:
            stub = worker_pb2_grpc.KvStub(channel)
            description = await stub.Connect(
                worker_pb2.ConnectRequest(reader_id=self.reader_id), timeout=CONNECT_TIMEOUT_S
            )
            if description.incarnation != incarnation:
                raise HandoffFailed(
                    f"the worker at {address} has restarted: {incarnation} is now {description.incarnation}"
                )
            await self.transfer.add_peer(description_from_proto(description))
            report = await self.transfer.warm_up(description.agent_name, CONNECT_TIMEOUT_S)
            self._rate(description.agent_name, report)
        except grpc.aio.AioRpcError as error:
            await channel.close(None)
            raise HandoffFailed(f"cannot reach the worker at {address}: {error.code().name}") from error
        except BaseException:
            await channel.close(None)
            raise
        log.info("can read from %s at %s", description.agent_name, address)
        return Peer(address, incarnation, description.agent_name, channel, stub)

    async def _disconnect(self, peer: Peer) -> None:
        self._known.pop(peer.address, None)
        worker_id = peer.agent_name.rpartition("/")[0]
        if worker_id in self._rates.now():
            self._rates.forget(worker_id)
            PEER_READ_RATE.remove(worker_id)
        await self.transfer.remove_peer(peer.agent_name)
        await peer.channel.close(None)
