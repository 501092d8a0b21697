"""How routers and workers learn which workers there are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc

from baton.errors import InvalidRequest
from baton.routing.view import WorkerView
from baton.rpc.channels import open_channel
from baton.rpc.kvstore_client import REPLY_TIMEOUT_S, ConnectionLost, Retry
from baton.rpc.kvstore_messages import check_worker, worker_view
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


class RegistryWatch:
    """The live workers, kept current for as long as `run` runs.

    With the kvstore away every worker known stays known. A kvstore that comes back empty-handed does
    not take workers away either, before they had `ttl_s` seconds to join it again.
    """

    def __init__(self, address: str, *, ttl_s: float, listener: PeerListener | None = None) -> None:
        self._address = address
        self._ttl_s = ttl_s
        self._listener = listener or PeerListener()
        self._peers: dict[str, Peer] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._registry_live = False
        self._current_at: float | None = None
        self._ready = asyncio.Event()

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The live workers by id; a view that changes with the cluster."""
        return MappingProxyType(self._peers)

    def views(self) -> list[WorkerView]:
        """The live workers as routing sees them."""
        return [peer.view for peer in self._peers.values()]

    @property
    def connected(self) -> bool:
        """Whether changes are arriving."""
        return self._registry_live

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
        """Wait until everything there is to know has been received once."""
        await self._ready.wait()

    async def run(self) -> None:
        """Follow the kvstore until cancelled."""
        async with open_channel(self._address) as channel, asyncio.TaskGroup() as tasks:
            self._follow(channel, tasks)

    def _follow(self, channel: grpc.aio.Channel, tasks: asyncio.TaskGroup) -> None:
        tasks.create_task(self._follow_registry(channel))

    async def _follow_registry(self, channel: grpc.aio.Channel) -> None:
        retry = Retry("workers", self._address)
        while True:
            async with retry.attempt():
                updates = kvstore_pb2_grpc.RegistryStub(channel).Watch(
                    kvstore_pb2.WatchRequest(), wait_for_ready=True
                )
                try:
                    async with asyncio.timeout(REPLY_TIMEOUT_S):
                        snapshot = await anext(aiter(updates), None)
                    if snapshot is None:
                        raise ConnectionLost("the kvstore ended the Watch stream")
                    retry.reached()
                    self._take_snapshot(snapshot)
                    self._registry_live = True
                    self._note_current()
                    async for update in updates:
                        for change in update.changes:
                            self._take_change(change)
                    raise ConnectionLost("the kvstore ended the Watch stream")
                finally:
                    self._note_current()
                    self._registry_live = False
                    self._stop_waiting()
                    updates.cancel()

    def _take_snapshot(self, update: kvstore_pb2.RegistryUpdate) -> None:
        listed = {change.worker.worker_id for change in update.changes}
        loop = asyncio.get_running_loop()
        for worker_id in self._peers.keys() - listed - self._leaving.keys():
            self._leaving[worker_id] = loop.call_later(self._ttl_s, self._remove, worker_id)
        for change in update.changes:
            self._take_change(change)

    def _stop_waiting(self) -> None:
        """Whoever had yet to join again stays for now: it cannot join a kvstore that is away."""
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()

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
        view = worker_view(change.worker, change.load, change.draining, change.read_bytes_per_s)
        peer = Peer(change.worker, change.load, view)
        timer = self._leaving.pop(worker_id, None)
        if timer is not None:
            timer.cancel()
        self._peers[worker_id] = peer
        if known is not None and known.view.incarnation == peer.view.incarnation:
            self._listener.worker_changed(peer)
            return
        if known is not None:
            self._forget(known)
            self._listener.worker_gone(known)
        self._listener.worker_added(peer)

    def _remove(self, worker_id: str) -> None:
        timer = self._leaving.pop(worker_id, None)
        if timer is not None:
            timer.cancel()
        peer = self._peers.pop(worker_id, None)
        if peer is not None:
            self._forget(peer)
            self._listener.worker_gone(peer)

    def _forget(self, peer: Peer) -> None:
        """Let go of what else is known of a worker that is gone."""

    def _note_current(self) -> None:
        if self.connected:
            self._current_at = asyncio.get_running_loop().time()
            self._ready.set()
