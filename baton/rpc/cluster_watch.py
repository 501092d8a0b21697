"""How routers and workers learn about the workers there are and the blocks they hold."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc

from baton.errors import InvalidRequest
from baton.kv.events import Verdict
from baton.kv.index import PrefixIndex
from baton.routing.view import WorkerView
from baton.rpc.channels import open_channel
from baton.rpc.kvstore_client import REPLY_TIMEOUT_S, ConnectionLost, Retry
from baton.rpc.kvstore_messages import check_worker, decode_events, worker_view
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc, worker_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """One live worker: as it described itself, as it reported its load, and as routing sees it."""

    worker: kvstore_pb2.Worker
    load: worker_pb2.WorkerLoad
    view: WorkerView


class PeerListener:
    """Hears about workers; override what matters. Called from the watch's loop: do not wait in here."""

    def worker_added(self, peer: Peer) -> None:
        """A worker is new, or is a new incarnation of one that has just gone."""

    def worker_changed(self, peer: Peer) -> None:
        """A worker has a new description or load, or has begun or ceased to drain."""

    def worker_gone(self, peer: Peer) -> None:
        """A worker has left, died, or was replaced."""


class ClusterWatch:
    """What is known of the cluster, kept current for as long as `run` runs.

    With the kvstore away everything known stays known. A kvstore that comes back empty-handed does not
    take workers away either, before they had `ttl_s` seconds to join it again.

    `index` is the replica of the prefix index; use it on the loop that `run` runs on.
    """

    def __init__(self, address: str, *, ttl_s: float, listener: PeerListener | None = None) -> None:
        self._address = address
        self._ttl_s = ttl_s
        self._listener = listener or PeerListener()
        self._peers: dict[str, Peer] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._registry_live = False
        self._index_live = False
        self._current_at: float | None = None
        self._ready = asyncio.Event()
        self.index = PrefixIndex()

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The live workers by id; a view that changes with the cluster."""
        return MappingProxyType(self._peers)

    def views(self) -> list[WorkerView]:
        """The live workers as routing sees them."""
        return [peer.view for peer in self._peers.values()]

    @property
    def connected(self) -> bool:
        """Whether changes of both the registry and the index are arriving."""
        return self._registry_live and self._index_live

    @property
    def lag_s(self) -> float:
        """Seconds since what is known here was last known to be current; 0 while connected.

        Infinity when the kvstore was never reached.
        """
        if self.connected:
            return 0.0
        if self._current_at is None:
            return float("inf")
        return asyncio.get_running_loop().time() - self._current_at

    async def ready(self) -> None:
        """Wait until registry and index have been received once."""
        await self._ready.wait()

    async def run(self) -> None:
        """Follow the kvstore until cancelled."""
        try:
            async with open_channel(self._address) as channel, asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_registry(channel))
                tasks.create_task(self._follow_index(channel))
        finally:
            for timer in self._leaving.values():
                timer.cancel()

    # ---- registry -----------------------------------------------------------------------------

    async def _follow_registry(self, channel: grpc.aio.Channel) -> None:
        retry = Retry(self._address)
        while True:
            async with retry.attempt():
                updates = kvstore_pb2_grpc.RegistryStub(channel).Watch(
                    kvstore_pb2.WatchRequest(), wait_for_ready=True
                )
                try:
                    async with asyncio.timeout(REPLY_TIMEOUT_S):
                        self._take_snapshot(await anext(aiter(updates)))
                    retry.reached()
                    self._registry_live = True
                    self._note_current()
                    async for update in updates:
                        for change in update.changes:
                            self._take_change(change)
                    raise ConnectionLost("the kvstore ended the Watch stream")
                except StopAsyncIteration:
                    raise ConnectionLost("the kvstore ended the Watch stream") from None
                finally:
                    self._note_current()
                    self._registry_live = False
                    updates.cancel()

    def _take_snapshot(self, update: kvstore_pb2.RegistryUpdate) -> None:
        listed = {change.worker.worker_id for change in update.changes}
        loop = asyncio.get_running_loop()
        for worker_id in self._peers.keys() - listed - self._leaving.keys():
            self._leaving[worker_id] = loop.call_later(self._ttl_s, self._remove, worker_id)
        for change in update.changes:
            self._take_change(change)

    def _take_change(self, change: kvstore_pb2.RegistryUpdate.Change) -> None:
        worker_id = change.worker.worker_id
        known = self._peers.get(worker_id)
        if change.gone:
            self._remove(worker_id)
            return
        try:
            check_worker(change.worker)
        except InvalidRequest as error:
            log.error("the kvstore told of a worker that cannot be used: %s", error)
            return
        peer = Peer(change.worker, change.load, worker_view(change.worker, change.load, change.draining))
        timer = self._leaving.pop(worker_id, None)
        if timer is not None:
            timer.cancel()
        self._peers[worker_id] = peer
        if known is not None and known.view.incarnation == peer.view.incarnation:
            self._listener.worker_changed(peer)
            return
        if known is not None:
            self._listener.worker_gone(known)
        self._listener.worker_added(peer)

    def _remove(self, worker_id: str) -> None:
        timer = self._leaving.pop(worker_id, None)
        if timer is not None:
            timer.cancel()
        peer = self._peers.pop(worker_id, None)
        if peer is not None:
            if self.index.incarnation(worker_id) == peer.view.incarnation:
                self.index.drop(worker_id)
            self._listener.worker_gone(peer)

    # ---- index --------------------------------------------------------------------------------

    async def _follow_index(self, channel: grpc.aio.Channel) -> None:
        retry = Retry(self._address)
        while True:
            async with retry.attempt():
                updates = kvstore_pb2_grpc.PrefixIndexStub(channel).Subscribe(
                    kvstore_pb2.SubscribeRequest(), wait_for_ready=True
                )
                try:
                    await self._take_updates(updates, retry)
                finally:
                    self._note_current()
                    self._index_live = False
                    updates.cancel()

    async def _take_updates(
        self,
        updates: grpc.aio.UnaryStreamCall[kvstore_pb2.SubscribeRequest, kvstore_pb2.IndexUpdate],
        retry: Retry,
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
            elif update.gone:
                if self.index.incarnation(update.events.worker_id) == update.events.incarnation:
                    self.index.drop(update.events.worker_id)
            else:
                listed.add(update.events.worker_id)
                self._take_events(update.events)

    def _take_events(self, wire: kvstore_pb2.IndexEvents) -> None:
        try:
            message = decode_events(wire)
        except InvalidRequest as error:
            raise ConnectionLost(f"the kvstore sent events that make no sense: {error}") from error
        verdict = self.index.apply(message)
        # Events of a worker that the registry has already declared gone may still be on their way.
        if verdict is Verdict.RESYNC and message.worker_id in self._peers:
            raise ConnectionLost(f"events of worker {message.worker_id} are missing")

    def _note_current(self) -> None:
        if self.connected:
            self._current_at = asyncio.get_running_loop().time()
            self._ready.set()
