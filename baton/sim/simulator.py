"""Run a workload on a cluster that is not there: `simulate`.

Policies, cost model, admission, prefix index, block pools, schedulers and reservations are the files that the
real processes run; what is simulated is time: of steps (`baton.sim.speed`), of bytes (`baton.sim.network`)
and of messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import inf

from baton.bench.records import Gaps, Records, RequestRecord
from baton.bench.summary import Summary, Targets, summarize
from baton.errors import BatonError
from baton.kv.events import Event, WorkerEvents
from baton.routing import Role, Unplaceable
from baton.sim.clock import Clock
from baton.sim.cluster import (
    Action,
    AddWorker,
    Controller,
    Failure,
    Observed,
    RemoveWorker,
    SetRole,
    SimCluster,
    WorkerSpec,
    WorkerTotals,
)
from baton.sim.door import Door
from baton.sim.handoff import Handoff, Pull
from baton.sim.job import Job, SimSequence
from baton.sim.network import Network
from baton.sim.router import Fleet, SimRouter
from baton.sim.worker import SimWorker
from baton.sim.workload import SimRequest

_MAX_PLACEMENTS = 4
_RETRY_S = 0.5


@dataclass(frozen=True)
class SimReport:
    """What came of a simulation.

    `workers` has one entry per incarnation of a worker. Tokens are prompt tokens: all that were asked for,
    those of them found cached where they were computed, and those of these read from another worker.
    `gpu_s` are device-seconds that were there, `events` how many steps the simulator itself took.
    """

    summary: Summary
    records: Records
    workers: Sequence[WorkerTotals]
    prompt_tokens: int
    cached_tokens: int
    pulled_tokens: int
    placements: dict[str, int]
    span_s: float
    gpu_s: float
    events: int

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that nobody had to compute."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def goodput_per_gpu(self) -> float | None:
        """Requests per second and device that met the targets; None without targets."""
        goodput = self.summary.goodput_per_s
        return None if goodput is None else goodput / max(1e-12, self.gpu_s / max(1e-12, self.span_s))

    def imbalance(self, role: Role) -> float:
        """The busiest worker's computing seconds over the mean of its role's."""
        busy = [worker.busy_s for worker in self.workers if worker.role is role]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0


def simulate(
    cluster: SimCluster,
    workload: Iterable[SimRequest],
    slo: Targets | None = None,
    *,
    controller: Controller | None = None,
    interval_s: float = 10.0,
    until_s: float = inf,
    price_per_gpu_hour: float | None = None,
    seed: int = 0,
) -> SimReport:
    """Serve `workload` on `cluster` in virtual time. Pure: the same arguments give the same report.

    Args:
        workload: requests in order of arrival; taken one by one, so it may be a generator of millions.
        slo: what a request must meet to count into goodput and attainment.
        controller: asked every `interval_s` what to change (roles, workers); see `Observed` and `Action`.
        until_s: stop there; requests without their last token then count as failed, `unfinished`.
        price_per_gpu_hour: for the costs in the summary.
        seed: of every draw; ties, candidates.

    Every request ends up in `SimReport.records`: failed ones too, with their error.
    """
    return _Simulation(cluster, slo, controller, interval_s, seed).run(workload, until_s, price_per_gpu_hour)


class _Simulation:
    """The world that workers and routers live in."""

    def __init__(
        self,
        cluster: SimCluster,
        slo: Targets | None,
        controller: Controller | None,
        interval_s: float,
        seed: int,
    ) -> None:
        self.cluster = cluster
        self.clock = Clock()
        self.network = Network(self.clock)
        self.records = Records()
        self.gaps: Gaps = self.records.gaps
        self._slo = slo
        self._controller = controller
        self._interval_s = interval_s
        self._fleet = Fleet(cluster, self.clock)
        self._routers = [
            SimRouter(number, self._fleet, seed + 2 * number) for number in range(cluster.routers)
        ]
        self._door: Door | None = None
        if cluster.admission is not None:
            self._door = Door(cluster.admission, self.clock, self._place, self._finish)
        self._jobs: dict[Job, None] = {}
        self._numbers = count()
        self._incarnations = count(1)
        self._sequences: Counter[str] = Counter()
        self._totals: list[WorkerTotals] = []
        self._counts: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._arriving = True
        self._last_s = 0.0
        self._interval: list[RequestRecord] = []
        self._arrived: Counter[str] = Counter()
        self._busy_s: dict[SimWorker, float] = {}
        for number, spec in enumerate(cluster.workers):
            self._start(f"{spec.role.value}-{number}", spec)

    def run(
        self, workload: Iterable[SimRequest], until_s: float, price_per_gpu_hour: float | None
    ) -> SimReport:
        self._expect(iter(workload))
        for failure in self.cluster.failures:
            self.clock.at(failure.at_s, self._fail, failure)
        if self._controller is not None:
            self.clock.after(self._interval_s, self._control)
        self.clock.run(until_s)
        for job in list(self._jobs):
            self._finish(job, "unfinished")
        span_s = self._last_s if until_s == inf else min(until_s, self.clock.now_s)
        for worker in self._fleet.workers.values():
            totals = worker.close()
            totals.until_s = max(totals.until_s, span_s)
            self._totals.append(totals)
        gpu_s = sum(t.gpus * max(0.0, min(t.until_s, span_s) - t.from_s) for t in self._totals)
        price = None
        if price_per_gpu_hour is not None and span_s:
            price = price_per_gpu_hour * gpu_s / span_s
        return SimReport(
            summary=summarize(self.records, self._slo, price),
            records=self.records,
            workers=self._totals,
            prompt_tokens=self._counts["prompt"],
            cached_tokens=self._counts["cached"],
            pulled_tokens=self._counts["pulled"],
            placements=dict(self._kinds),
            span_s=span_s,
            gpu_s=gpu_s,
            events=self.clock.events,
        )

    # ---- requests -----------------------------------------------------------------------------

    def _expect(self, workload: Iterator[SimRequest]) -> None:
        request = next(workload, None)
        if request is None:
            self._arriving = False
        else:
            self.clock.at(request.arrival_s, self._arrive, request, workload)

    def _arrive(self, request: SimRequest, workload: Iterator[SimRequest]) -> None:
        self._expect(workload)
        number = next(self._numbers)
        job = Job(number, request, number % len(self._routers))
        self._jobs[job] = None
        self._arrived["requests"] += 1
        self._arrived["tokens"] += request.prompt_tokens
        self.clock.after(self.cluster.router_s, self._enter, job)

    def _enter(self, job: Job) -> None:
        if self._door is None:
            self._place(job)
        else:
            self._door.enter(job, self._routers[job.router])

    def _place(self, job: Job) -> None:
        """Choose workers for a request and send it there."""
        if job.ended:
            return
        job.attempt += 1
        try:
            placement = self._routers[job.router].place(job)
        except Unplaceable:
            self._unplaceable(job)
            return
        job.placements += 1
        job.placement = placement
        decode = self._fleet.workers[placement.decode.worker_id]
        decode.jobs[job] = None
        pull = placement.pull
        source = None if pull is None else self._fleet.workers[pull.worker.worker_id]
        blocks = 0 if pull is None else pull.blocks
        attempt = job.attempt
        if placement.prefill is None:
            self._kinds["local"] += 1
            self.clock.after(self.cluster.network_s, self._begin_local, job, attempt, decode, source, blocks)
            return
        self._kinds["remote"] += 1
        prefill = self._fleet.workers[placement.prefill.worker_id]
        handoff = Handoff(
            self,
            job,
            decode,
            prefill,
            source,
            blocks,
            lambda reason: self._broken(job, attempt, prefill.worker_id, reason),
        )
        self.clock.after(self.cluster.network_s, handoff.start)

    def _unplaceable(self, job: Job) -> None:
        """A first placement is made now or never; a replacement may wait for the cluster to change."""
        if job.placements == 0 or (not self._fleet.workers and not self._changes_come()):
            self._finish(job, "service_unavailable_error")
            return
        job.avoid = frozenset()
        job.placements += 1
        if job.placements > _MAX_PLACEMENTS * 8:
            self._finish(job, "service_unavailable_error")
        else:
            self.clock.after(_RETRY_S, self._place, job)

    def _changes_come(self) -> bool:
        return self._controller is not None or bool(self.cluster.failures)

    def _begin_local(
        self, job: Job, attempt: int, decode: SimWorker, source: SimWorker | None, blocks: int
    ) -> None:
        if job.attempt != attempt or job.ended or not decode.alive:
            return
        sequence = SimSequence(job, self.cluster.block_tokens)

        def submit() -> None:
            if job.attempt != attempt or job.ended:
                return
            try:
                decode.submit(sequence)
            except BatonError as error:
                self._broken(job, attempt, decode.worker_id, error.openai_type)

        if source is None:
            submit()
        else:
            Pull(self, decode, source, sequence, blocks, submit).start()

    def _broken(self, job: Job, attempt: int, worker_id: str, reason: str) -> None:
        """A placement ended before its request did: try another, as often as the router would."""
        if job.attempt != attempt or job.ended:
            return
        if job.placement is not None:
            decode = self._fleet.workers.get(job.placement.decode.worker_id)
            if decode is not None:
                decode.jobs.pop(job, None)
        if job.placements >= _MAX_PLACEMENTS:
            self._finish(job, reason)
            return
        job.avoid |= {worker_id}
        self.clock.after(self.cluster.network_s, self._place, job)

    def _finish(self, job: Job, error: str = "") -> None:
        if job.ended:
            return
        job.ended = True
        del self._jobs[job]
        self._routers[job.router].release(job)
        record = job.record(error)
        self.records.append(record)
        if self._controller is not None:
            self._interval.append(record)
        self._last_s = max(self._last_s, self.clock.now_s)
        if self._door is not None:
            self._door.left(job)

    # ---- what workers say (see `World`) -------------------------------------------------------

    def prefilled(self, sequence: SimSequence, worker: SimWorker, prefill_s: float) -> None:
        job, cached_tokens = sequence.job, sequence.cached_tokens or 0
        if job.output == 0:
            job.cached_tokens = cached_tokens
            self._counts["prompt"] += job.request.prompt_tokens
            self._counts["cached"] += cached_tokens
            self._counts["pulled"] += sequence.pulled_tokens
        router = self._routers[job.router]
        self.clock.after(self.cluster.network_s, router.prefilled, job, worker, cached_tokens, prefill_s)

    def finished(self, job: Job) -> None:
        self._finish(job)

    def published(self, worker: SimWorker, events: Sequence[Event]) -> None:
        self._sequences[worker.worker_id] += 1
        message = WorkerEvents(
            worker.worker_id,
            str(worker.incarnation),
            self._sequences[worker.worker_id],
            False,
            tuple(events),
        )
        self.clock.after(self.cluster.network_s, self._index, worker, message)

    def _index(self, worker: SimWorker, message: WorkerEvents) -> None:
        if worker.alive:
            self._fleet.index.apply(message)

    # ---- workers that come, go and change -----------------------------------------------------

    def _start(self, worker_id: str, spec: WorkerSpec) -> None:
        worker = SimWorker(worker_id, next(self._incarnations), spec, self)
        self._fleet.join(worker)
        self._busy_s[worker] = 0.0
        self._sequences[worker_id] = 1
        hello = WorkerEvents(worker_id, str(worker.incarnation), 1, True, ())
        self._fleet.index.apply(hello)

    def _gone(self, worker: SimWorker) -> None:
        self._fleet.leave(worker.worker_id)
        for router in self._routers:
            router.forget(worker.worker_id)
        del self._busy_s[worker]
        self._totals.append(worker.close())

    def _fail(self, failure: Failure) -> None:
        worker = self._fleet.workers.get(failure.worker_id)
        if worker is None:
            return
        worker.die()
        lost = dict.fromkeys([*worker.jobs, *(handoff.job for handoff in worker.handoffs)])
        for handoff in list(worker.handoffs):
            handoff.abort()
        for pull in list(worker.pulls):
            pull.source_died()
        self._gone(worker)
        for job in lost:
            if job.placement is not None:
                decode = self._fleet.workers.get(job.placement.decode.worker_id)
                if decode is not None:
                    decode.jobs.pop(job, None)
            job.attempt += 1
            job.avoid |= {failure.worker_id}
            self.clock.after(self.cluster.detect_s, self._place, job)
        self.clock.after(failure.back_after_s, self._back, failure.worker_id, worker.spec)

    def _back(self, worker_id: str, spec: WorkerSpec) -> None:
        if worker_id not in self._fleet.workers:
            self._start(worker_id, spec)
            for job in self._jobs:
                job.avoid -= {worker_id}

    def _control(self) -> None:
        controller = self._controller
        if controller is None or not (self._jobs or self._arriving):
            return
        for worker in [w for w in self._fleet.workers.values() if w.draining and w.idle]:
            self._gone(worker)
        busy = {}
        for worker in self._fleet.workers.values():
            spent_s = worker.busy_s()
            busy[worker.worker_id] = min(1.0, (spent_s - self._busy_s[worker]) / self._interval_s)
            self._busy_s[worker] = spent_s
        router = self._routers[0]
        observed = Observed(
            now_s=self.clock.now_s,
            interval_s=self._interval_s,
            workers=[router.view(worker) for worker in self._fleet.workers.values()],
            busy=busy,
            arrived=self._arrived["requests"],
            arrived_prompt_tokens=self._arrived["tokens"],
            finished=self._interval,
            waiting_at_the_door=self._door.waiting if self._door is not None else 0,
        )
        self._interval = []
        self._arrived.clear()
        for action in controller(observed):
            self._act(action)
        self.clock.after(self._interval_s, self._control)

    def _act(self, action: Action) -> None:
        match action:
            case SetRole(worker_id, role):
                self._fleet.workers[worker_id].role = role
            case AddWorker(worker_id, spec, after_s):
                self.clock.after(after_s, self._back, worker_id, spec)
            case RemoveWorker(worker_id):
                self._fleet.workers[worker_id].draining = True
