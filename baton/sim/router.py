"""A simulated router: the real policies on what it knows of the workers, a little late."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from random import Random

from baton.kv.index import PrefixIndex
from baton.routing import ClusterView, Placement, Request, Role, WorkerView, create_policy
from baton.routing.admission import Pace
from baton.routing.correction import Correction
from baton.routing.cost import compute_s
from baton.sim.clock import Clock
from baton.sim.cluster import SimCluster
from baton.sim.job import Job
from baton.sim.worker import LoadReport, SimWorker

# These are the router's own: how long a report may be under way, how many conversations are remembered,
# at which prompt length speed is read off curves, how many requests may wait at an idle decode worker.
_IN_FLIGHT_S = 0.05
_CONVERSATIONS = 65_536
_PROMPT_TOKENS = 512
_BATCH = 64
_HOLDERS = 4


@dataclass(eq=False, slots=True)
class Promise:
    """Work given to a worker that it has not reported yet."""

    made_s: float
    router: int
    requests: int
    queued_tokens: int
    blocks: int


@dataclass(eq=False, slots=True)
class _Known:
    """A view of a worker and what it was made of."""

    load: LoadReport
    promised: tuple[int, int, int]
    scale: float
    role: Role
    draining: bool
    view: WorkerView


class Fleet:
    """The workers, who holds which block, and what all routers have promised."""

    def __init__(self, cluster: SimCluster, clock: Clock) -> None:
        self.cluster = cluster
        self.clock = clock
        self.workers: dict[str, SimWorker] = {}
        self.index = PrefixIndex()
        self.promises: dict[str, deque[Promise]] = {}
        self._bandwidths: dict[float, Mapping[str, float]] = {}

    def join(self, worker: SimWorker) -> None:
        """A worker takes work from now on."""
        self.workers[worker.worker_id] = worker
        self.promises[worker.worker_id] = deque()
        self._bandwidths.clear()

    def leave(self, worker_id: str) -> None:
        """A worker is gone."""
        del self.workers[worker_id]
        del self.promises[worker_id]
        self.index.drop(worker_id)
        self._bandwidths.clear()

    def promise(self, worker_id: str, promise: Promise) -> None:
        """Count work as the worker's until it reports it."""
        self.promises[worker_id].append(promise)

    def release(self, worker_id: str, promise: Promise) -> None:
        """The worker has the work, or will never have it."""
        promises = self.promises.get(worker_id)
        if promises is not None and promise in promises:
            promises.remove(promise)

    def promised(self, worker_id: str, load: LoadReport, router: int) -> tuple[int, int, int]:
        """Requests, prompt tokens and blocks that the worker has been promised and `load` has not."""
        promises = self.promises[worker_id]
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


class SimRouter:
    """One router: its policy, what it has learnt, and where conversations were."""

    def __init__(self, number: int, fleet: Fleet, seed: int) -> None:
        self.number = number
        self._fleet = fleet
        self._cluster = fleet.cluster
        self._rng = Random(seed)
        self._policy = create_policy(fleet.cluster.policy, Random(seed + 1))
        self._correction = Correction()
        self._conversations: dict[str, str] = {}
        self._known: dict[str, _Known] = {}
        self._held: dict[Job, list[tuple[str, Promise]]] = {}

    def place(self, job: Job) -> Placement:
        """Choose workers for a request, and promise them the work.

        Raises:
            Unplaceable: no worker can take it now.
        """
        asked, cluster = job.request, self._cluster
        request = Request(
            prompt_tokens=job.context_tokens,
            blocks=-(-(asked.prompt_tokens + asked.output_tokens) // cluster.block_tokens),
            block_size=cluster.block_tokens,
            block_bytes=cluster.block_bytes,
            held=self._fleet.index.lookup(asked.chain),
            avoid=job.avoid,
            slo=asked.slo,
            session=asked.session,
            session_worker=self._conversations.get(asked.session),
        )
        view = ClusterView([self.view(worker) for worker in self._candidates(request)])
        placement = self._policy.place(request, view)
        if asked.session:
            self._remember(asked.session, placement.decode.worker_id)
        self.release(job)
        self._held[job] = self._promise(placement, request)
        return placement

    def release(self, job: Job) -> None:
        """What the job's workers were promised they have by now, or will never have."""
        for worker_id, promise in self._held.pop(job, ()):
            self._fleet.release(worker_id, promise)

    def prefilled(self, job: Job, worker: SimWorker, cached_tokens: int, prefill_s: float) -> None:
        """Learn how far the worker's prefill curve is off; its work is promised no more."""
        self.release(job)
        predicted_s = compute_s(self._raw(worker), job.context_tokens, cached_tokens)
        self._correction.learn(worker.worker_id, predicted_s, prefill_s)

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        self._correction.forget(worker_id)
        self._known.pop(worker_id, None)

    def view(self, worker: SimWorker) -> WorkerView:
        """A worker as this router sees it now."""
        worker_id = worker.worker_id
        load = worker.reported()
        promised = self._fleet.promised(worker_id, load, self.number)
        scale = self._correction.factor(worker_id)
        known = self._known.get(worker_id)
        if (
            known is not None
            and known.load is load
            and known.promised == promised
            and known.scale == scale
            and known.role is worker.role
            and known.draining is worker.draining
        ):
            return known.view
        requests, queued_tokens, blocks = promised
        view = WorkerView(
            worker_id=worker_id,
            incarnation=str(worker.incarnation),
            address="",
            role=worker.role,
            total_blocks=worker.spec.kv_blocks,
            free_blocks=max(0, load.free_blocks - blocks),
            cached_blocks=load.cached_blocks,
            running=load.running,
            waiting=load.waiting + requests,
            queued_tokens=load.queued_tokens + queued_tokens,
            draining=worker.draining,
            prefill_curve=worker.prefill_curve,
            decode_curve=worker.decode_curve,
            read_bytes_per_s=self._fleet.read_rates(worker.spec.network_bytes_per_s),
        )
        view = self._correction.apply(view)
        self._known[worker_id] = _Known(load, promised, scale, worker.role, worker.draining, view)
        return view

    def has_room(self) -> bool:
        """Whether some worker would begin a prompt soon enough, and some decode worker has not a whole
        batch waiting; see `services/router/placement.py`."""
        decoders, prefillers = self._takers()
        if not decoders:
            return True
        ahead_s = self._cluster.prefill_ahead_s
        return any(worker.backlog_s <= ahead_s for worker in prefillers) and any(
            worker.waiting < max(_BATCH, worker.running) for worker in decoders
        )

    def pace(self) -> Pace:
        """How fast waiting requests will start and end, as the workers' curves have it."""
        decoders, prefillers = self._takers()
        if not decoders:
            return Pace()
        prompt_s = sum(worker.prefill_curve.seconds(_PROMPT_TOKENS) for worker in prefillers)
        step_s = sum(worker.decode_curve.seconds(max(1, worker.running)) for worker in decoders)
        backlog_s = min(worker.backlog_s for worker in prefillers)
        return Pace(
            prefill_s=prompt_s / len(prefillers) / _PROMPT_TOKENS,
            prefillers=len(prefillers),
            step_s=step_s / len(decoders),
            backlog_s=max(0.0, backlog_s - self._cluster.prefill_ahead_s),
        )

    def _takers(self) -> tuple[list[WorkerView], list[WorkerView]]:
        views = [self.view(worker) for worker in self._fleet.workers.values() if not worker.draining]
        decoders = [view for view in views if view.role.decodes]
        return decoders, [view for view in views if view.role is Role.PREFILL] or decoders

    def _candidates(self, request: Request) -> Sequence[SimWorker]:
        """The workers that are weighed: all, or those that hold most and some drawn of each role."""
        workers, most = self._fleet.workers, self._cluster.candidates
        if not most or len(workers) <= 2 * most:
            return list(workers.values())
        chosen: dict[SimWorker, None] = {}
        held = request.held
        for worker_id in nlargest(_HOLDERS, held, key=lambda worker_id: held[worker_id]):
            if worker_id in workers:
                chosen[workers[worker_id]] = None
        if request.session_worker in workers:
            chosen[workers[request.session_worker]] = None
        everyone = list(workers.values())
        for decodes in (True, False):
            drawn, tries = 0, 0
            while drawn < most and tries < 8 * most:
                worker = everyone[int(self._rng.random() * len(everyone))]
                tries += 1
                if worker.role.decodes is decodes and worker.alive and not worker.draining:
                    chosen[worker] = None
                    drawn += 1
        return list(chosen)

    def _raw(self, worker: SimWorker) -> WorkerView:
        """The worker with its curve as measured."""
        return WorkerView(worker.worker_id, "", "", worker.role, 1, 1, prefill_curve=worker.prefill_curve)

    def _promise(self, placement: Placement, request: Request) -> list[tuple[str, Promise]]:
        decode, computing = placement.decode.worker_id, placement.computing.worker_id
        promises = [
            (
                worker_id,
                Promise(
                    self._fleet.clock.now_s,
                    self.number,
                    requests=1 if worker_id == decode else 0,
                    queued_tokens=placement.compute_tokens if worker_id == computing else 0,
                    blocks=max(0, request.prompt_blocks - request.held.get(worker_id, 0)),
                ),
            )
            for worker_id in sorted({decode, computing})
        ]
        for worker_id, promise in promises:
            self._fleet.promise(worker_id, promise)
        return promises

    def _remember(self, session: str, worker_id: str) -> None:
        self._conversations.pop(session, None)
        self._conversations[session] = worker_id
        if len(self._conversations) > _CONVERSATIONS:
            del self._conversations[next(iter(self._conversations))]
