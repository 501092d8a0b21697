"""What all simulated routers share: the workers, who holds which block, and what was promised to whom."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.kv.index import PrefixIndex
from baton.sim.clock import Clock
from baton.sim.cluster import SimCluster
from baton.sim.worker import LoadReport, SimWorker

_IN_FLIGHT_S = 0.05
"""How long a report may be under way, as the router has it."""


@dataclass(eq=False, slots=True)
class Promise:
    """Work given to a worker that it has not reported yet."""

    worker_id: str
    made_s: float
    router: int
    requests: int
    queued_tokens: int
    blocks: int


class Fleet:
    """The workers. Tell it with `changed` when one takes other work than before, or none."""

    def __init__(self, cluster: SimCluster, clock: Clock) -> None:
        self.cluster = cluster
        self.clock = clock
        self.workers: dict[str, SimWorker] = {}
        self.index = PrefixIndex()
        self._promises: dict[str, deque[Promise]] = {}
        self._bandwidths: dict[float, Mapping[str, float]] = {}
        self._roles: dict[bool, Sequence[str]] = {}

    @property
    def roles(self) -> Mapping[bool, Sequence[str]]:
        """The ids of the workers that take new work, by whether they decode."""
        if not self._roles:
            live = [worker for worker in self.workers.values() if worker.alive and not worker.draining]
            self._roles = {
                decodes: [worker.worker_id for worker in live if worker.role.decodes is decodes]
                for decodes in (True, False)
            }
        return self._roles

    def changed(self) -> None:
        """A worker came or went, or its role did."""
        self._roles.clear()

    def join(self, worker: SimWorker) -> None:
        """A worker takes work from now on."""
        self.workers[worker.worker_id] = worker
        self._promises[worker.worker_id] = deque()
        self._bandwidths.clear()
        self.changed()

    def leave(self, worker_id: str) -> None:
        """A worker is gone."""
        del self.workers[worker_id]
        del self._promises[worker_id]
        self.index.drop(worker_id)
        self._bandwidths.clear()
        self.changed()

    def promise(self, promise: Promise) -> None:
        """Count work as the worker's until it reports it."""
        self._promises[promise.worker_id].append(promise)

    def release(self, promise: Promise) -> None:
        """The worker has the work, or will never have it."""
        promises = self._promises.get(promise.worker_id)
        if promises is not None and promise in promises:
            promises.remove(promise)

    def promised(self, worker_id: str, load: LoadReport, router: int) -> tuple[int, int, int]:
        """Requests, prompt tokens and blocks that the worker has been promised and `load` has not."""
        promises = self._promises[worker_id]
        known_s = load.at_s + self.cluster.network_s - _IN_FLIGHT_S
        while promises and promises[0].made_s < known_s:
            promises.popleft()
        shared_s = self.clock.now_s - self.cluster.share_s
        requests = queued_tokens = blocks = 0
        for promise in promises:
            if promise.router == router or promise.made_s <= shared_s:
                requests += promise.requests
                queued_tokens += promise.queued_tokens
                blocks += promise.blocks
        return requests, queued_tokens, blocks

    def read_rates(self, bytes_per_s: float) -> Mapping[str, float]:
        """What a worker with such a card measures of reads from the others."""
        rates = self._bandwidths.get(bytes_per_s)
        if rates is None:
            rates = self._bandwidths[bytes_per_s] = {
                worker_id: min(bytes_per_s, worker.spec.network_bytes_per_s)
                for worker_id, worker in self.workers.items()
            }
        return rates
