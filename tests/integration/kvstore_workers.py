"""Workers without an engine: what they hold is known, so what the kvstore tells of it can be checked."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

from baton.kv.events import Event, Removed, Stored, Tier
from baton.rpc.cluster_watch import ClusterWatch, Peer, PeerListener
from baton.rpc.kvstore_client import WorkerMembership
from baton.rpc.v1 import kvstore_pb2, worker_pb2
from tests.integration.kvstore_processes import ROOT, Process

TTL_S = 5.0


@asynccontextmanager
async def running(*runners: WorkerMembership | ClusterWatch) -> AsyncIterator[None]:
    """Run clients for the length of the block."""
    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(runner.run()) for runner in runners]
        yield
        for task in started:
            task.cancel()


class Publisher:
    """A worker whose engine does random things; chains are paths in a tree, closed under prefixes."""

    def __init__(self, address: str, worker_id: str, incarnation: str = "1") -> None:
        self.held: dict[bytes, tuple[int, ...]] = {}
        self.snapshots = 0
        self.worker = kvstore_pb2.Worker(
            worker_id=worker_id,
            incarnation=incarnation,
            address="127.0.0.1:1",
            role=worker_pb2.ROLE_DECODE,
            total_blocks=100_000,
        )
        self.membership = WorkerMembership(address, self.worker, self._snapshot)
        self._random = random.Random(worker_id)

    async def _snapshot(self) -> Sequence[Event]:
        self.snapshots += 1
        return [Stored(list(self.held))]

    def store(self, *path: int) -> None:
        ids = chain(*path)
        self.held.update({block_id: path[: depth + 1] for depth, block_id in enumerate(ids)})
        self.membership.publish([Stored(ids)])

    def hold(self, ids: Sequence[bytes]) -> None:
        """Store blocks of no known chain."""
        self.held.update(dict.fromkeys(ids, ()))
        self.membership.publish([Stored(ids)])

    def step(self) -> None:
        """What one engine step may do: store a chain, evict some leaves, or both."""
        rng = self._random
        self.store(*(rng.randrange(3) for _ in range(rng.randint(1, 8))))
        events = []
        for _ in range(rng.randrange(4)):
            parents = {path[:-1] for path in self.held.values()}
            leaf = rng.choice([i for i, path in self.held.items() if path not in parents])
            del self.held[leaf]
            events.append(Removed([leaf]))
            if not self.held:
                break
        self.membership.publish(events)

    def agrees(self, watch: ClusterWatch) -> bool:
        """Whether the replica has exactly these blocks for this worker."""
        worker_id = self.worker.worker_id
        index = watch.index
        mine = all(index.holders(i).get(worker_id) is Tier.DEVICE for i in self.held)
        gone = all(worker_id not in index.holders(i) for i in EVERY_BLOCK if i not in self.held)
        return mine and gone


def chain(*path: int) -> list[bytes]:
    return [bytes(path[: depth + 1]).rjust(16, b"\xff") for depth in range(len(path))]


def _tree(depth: int) -> Iterator[tuple[int, ...]]:
    if depth:
        for path in _tree(depth - 1):
            yield path
            if len(path) == depth - 1:
                for child in range(3):
                    yield (*path, child)
    else:
        yield ()


EVERY_BLOCK = [chain(*path)[-1] for path in _tree(8) if path]


class Recorder(PeerListener):
    """Writes down what happened to whom."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def worker_added(self, peer: Peer) -> None:
        self.heard.append(f"added {peer.worker.worker_id}/{peer.worker.incarnation}")

    def worker_gone(self, peer: Peer) -> None:
        self.heard.append(f"gone {peer.worker.worker_id}/{peer.worker.incarnation}")


def watch(store: Process, listener: PeerListener | None = None) -> ClusterWatch:
    return ClusterWatch(store.address, ttl_s=TTL_S, listener=listener)


@asynccontextmanager
async def worker_process(store: Process, incarnation: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.integration.registered_worker"]
    process = subprocess.Popen([*command, store.address, "w", incarnation, "100"], cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
