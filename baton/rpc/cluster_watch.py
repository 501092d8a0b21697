"""How routers learn which workers there are and which of them holds which block."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeAlias

import grpc

from baton.errors import InvalidRequest
from baton.kv.events import Verdict
from baton.kv.index import PrefixIndex
from baton.rpc.kvstore_client import REPLY_TIMEOUT_S, ConnectionLost, Retry
from baton.rpc.kvstore_messages import decode_events, encode_chains
from baton.rpc.registry_watch import Peer, PeerListener, RegistryWatch
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc

__all__ = ["ClusterWatch", "Peer", "PeerListener"]

log = logging.getLogger(__name__)

Updates: TypeAlias = "grpc.aio.UnaryStreamCall[kvstore_pb2.SubscribeRequest, kvstore_pb2.IndexUpdate]"

_REPORT_FOUND_INTERVAL_S = 0.5


class ClusterWatch(RegistryWatch):
    """The live workers and a replica of the prefix index, kept current for as long as `run` runs.

    `index` is that replica; use it on the loop that `run` runs on. With the kvstore away it stays as it
    is; afterwards each worker's blocks stay until a newer snapshot of that worker, or until it is gone.
    `index_max_bytes` bounds its memory (see `PrefixIndex`); 0 does not.
    """

    def __init__(
        self, address: str, *, ttl_s: float, listener: PeerListener | None = None, index_max_bytes: int = 0
    ) -> None:
        super().__init__(address, ttl_s=ttl_s, listener=listener)
        self._index_live = False
        self._index_max_bytes = index_max_bytes
        self._told_of_bound = False
        self.index = PrefixIndex(index_max_bytes)

    @property
    def connected(self) -> bool:
        """Whether changes of both the registry and the index are arriving."""
        return self._registry_live and self._index_live

    def _follow(self, channel: grpc.aio.Channel, tasks: asyncio.TaskGroup) -> None:
        super()._follow(channel, tasks)
        tasks.create_task(self._follow_index(channel))

    def _forget(self, peer: Peer) -> None:
        if self.index.incarnation(peer.view.worker_id) == peer.view.incarnation:
            self.index.drop(peer.view.worker_id)

    async def _follow_index(self, channel: grpc.aio.Channel) -> None:
        retry = Retry("index", self._address)
        while True:
            async with retry.attempt():
                updates = kvstore_pb2_grpc.PrefixIndexStub(channel).Subscribe(
                    kvstore_pb2.SubscribeRequest(), wait_for_ready=True
                )
                try:
                    async with asyncio.TaskGroup() as tasks:
                        await self._take_updates(updates, channel, tasks, retry)
                finally:
                    self._note_current()
                    self._index_live = False
                    self.index.keep_found = False
                    self.index.take_found()
                    updates.cancel()

    async def _take_updates(
        self, updates: Updates, channel: grpc.aio.Channel, tasks: asyncio.TaskGroup, retry: Retry
    ) -> None:
        listed: set[str] = set()
        stream = aiter(updates)
        while True:
            # Only the snapshot is due at any time: a quiet cluster has no events.
            async with asyncio.timeout(None if self._index_live else REPLY_TIMEOUT_S):
                update = await anext(stream, None)
            if update is None:
                raise ConnectionLost("the kvstore ended the Subscribe stream")
            if update.snapshot_done:
                retry.reached()
                self._index_live = True
                self._note_current()
                # Blocks of workers that went while nobody listened.
                for worker_id in set(self.index.workers()) - listed - self._peers.keys():
                    self.index.drop(worker_id)
            elif update.report_found:
                if not self.index.keep_found:
                    self.index.keep_found = True
                    tasks.create_task(self._report_found(channel))
            elif update.gone:
                if self.index.incarnation(update.events.worker_id) == update.events.incarnation:
                    self.index.drop(update.events.worker_id)
            else:
                listed.add(update.events.worker_id)
                self._take_events(update.events)

    async def _report_found(self, channel: grpc.aio.Channel) -> None:
        """Tell the kvstore, whose index is filling up, what is of use here."""
        call = kvstore_pb2_grpc.PrefixIndexStub(channel).ReportFound()
        try:
            while True:
                await asyncio.sleep(_REPORT_FOUND_INTERVAL_S)
                for message in encode_chains(self.index.take_found()):
                    async with asyncio.timeout(REPLY_TIMEOUT_S):
                        await call.write(message)
        finally:
            call.cancel()

    def _take_events(self, wire: kvstore_pb2.IndexEvents) -> None:
        try:
            message = decode_events(wire)
        except InvalidRequest as error:
            raise ConnectionLost(f"the kvstore sent events that make no sense: {error}") from error
        verdict = self.index.apply(message)
        if self.index.evicted and not self._told_of_bound:
            self._told_of_bound = True
            log.warning(
                "the index has reached --index-max-bytes %d and forgets what was used least recently; "
                "raise it if there is memory",
                self._index_max_bytes,
            )
        # Events of a worker that the registry has already declared gone may still be on their way.
        if verdict is Verdict.RESYNC and message.worker_id in self._peers:
            raise ConnectionLost(f"events of worker {message.worker_id} are missing")
