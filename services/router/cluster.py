"""What the router knows of the workers, and who in the router hears when that changes."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from baton.kv.hashing import KvLayout
from baton.kv.index import PrefixIndex
from baton.routing.view import WorkerView
from baton.rpc.cluster_watch import ClusterWatch, Peer, PeerListener
from baton.rpc.reservations import SharedReservations
from baton.rpc.v1 import worker_pb2
from services.router.promises import Reservations


@dataclass(frozen=True)
class KnownWorker:
    """A live worker as the registry last described it."""

    view: WorkerView
    layout: KvLayout
    max_model_len: int


class Cluster(Protocol):
    """The router's copy of what the kvstore knows; the last known state while that is away."""

    @property
    def workers(self) -> Mapping[str, KnownWorker]:
        """Live workers by id."""

    @property
    def index(self) -> PrefixIndex:
        """Who holds which block."""

    @property
    def reservations(self) -> Reservations:
        """What the routers have promised."""

    @property
    def connected(self) -> bool:
        """Whether all this is current, as far as is known."""

    async def run(self) -> None:
        """Follow the kvstore until cancelled."""


class ClusterListener(Protocol):
    """What the router does when the registry speaks."""

    def on_workers(self) -> None:
        """A worker came, went, or changed in more than its load."""

    def on_load(self, worker_id: str, load: worker_pb2.WorkerLoad) -> None:
        """A worker reported its load."""

    def on_gone(self, worker_id: str) -> None:
        """A worker went."""


class WatchedCluster(PeerListener):
    """The cluster as the kvstore tells it. `run` follows it until cancelled."""

    def __init__(self, kvstore: str, ttl_s: float, index_max_bytes: int) -> None:
        self._watch = ClusterWatch(kvstore, ttl_s=ttl_s, listener=self, index_max_bytes=index_max_bytes)
        self._workers: dict[str, KnownWorker] = {}
        self.listener: ClusterListener | None = None
        self._reservations = SharedReservations(kvstore, router_id())

    @property
    def workers(self) -> Mapping[str, KnownWorker]:
        return self._workers

    @property
    def index(self) -> PrefixIndex:
        return self._watch.index

    @property
    def reservations(self) -> Reservations:
        return self._reservations

    @property
    def connected(self) -> bool:
        return self._watch.connected

    @property
    def lag_s(self) -> float:
        """Seconds for which what is known here has not been known to be current."""
        return self._watch.lag_s

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch.run())
            tasks.create_task(self._reservations.run())

    def worker_added(self, peer: Peer) -> None:
        self.worker_changed(peer)

    def worker_changed(self, peer: Peer) -> None:
        worker_id = peer.view.worker_id
        before = self._workers.get(worker_id)
        now = self._workers[worker_id] = _known(peer)
        if self.listener is None:
            return
        self.listener.on_load(worker_id, peer.load)
        if before is None or _identity(before) != _identity(now):
            self.listener.on_workers()

    def worker_gone(self, peer: Peer) -> None:
        self._workers.pop(peer.view.worker_id, None)
        if self.listener is not None:
            self.listener.on_gone(peer.view.worker_id)
            self.listener.on_workers()


def router_id() -> str:
    """The name of this process among the routers."""
    return f"router-{socket.gethostname()}-{os.getpid()}"


def _known(peer: Peer) -> KnownWorker:
    layout = peer.worker.layout
    return KnownWorker(
        view=peer.view,
        layout=KvLayout(
            model_fingerprint=layout.model_fingerprint,
            dtype=layout.dtype,
            block_size=max(1, layout.block_size),
            block_bytes=layout.block_bytes,
            format=layout.format,
        ),
        max_model_len=peer.worker.max_model_len,
    )


def _identity(worker: KnownWorker) -> tuple[object, ...]:
    view = worker.view
    return (view.incarnation, view.address, view.role, view.draining, worker.layout, worker.max_model_len)
