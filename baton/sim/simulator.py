"""Run a workload on a cluster that is not there: `simulate`.

Policies, cost model, admission, prefix index, block pools, schedulers and reservations are the files that the
real processes run; what is simulated is time: of steps (`baton.sim.speed`), of bytes (`baton.sim.network`)
and of messages.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from math import inf

from baton.bench.records import Gaps, Records
from baton.bench.summary import Targets, summarize
from baton.kv.events import Event, WorkerEvents
from baton.routing.attempts import Attempts
from baton.sim.clock import Clock
from baton.sim.cluster import Controller, SimCluster
from baton.sim.door import Door
from baton.sim.fleet import Fleet
from baton.sim.job import Job, SimSequence
from baton.sim.lifecycle import Lifecycle
from baton.sim.network import Network
from baton.sim.operations import Operations, Watch
from baton.sim.report import SimReport
from baton.sim.router import SimRouter
from baton.sim.worker import SimWorker
from baton.sim.workload import SimRequest

__all__ = ["SimReport", "simulate"]


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
    with _collecting_seldom():
        simulation = _Simulation(cluster, controller, interval_s, seed)
        simulation.run(iter(workload), until_s)
    return simulation.report(slo, until_s, price_per_gpu_hour)


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Among the many values that live on, few are in cycles: looking for those as often as Python does would
    take a quarter of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Simulation:
    """The world that workers and routers live in (see `World`)."""

    def __init__(
        self, cluster: SimCluster, controller: Controller | None, interval_s: float, seed: int
    ) -> None:
        self.cluster = cluster
        self.clock = Clock()
        self.network = Network(self.clock)
        self.records = Records()
        self.gaps: Gaps = self.records.gaps
        self._fleet = fleet = Fleet(cluster, self.clock)
        self._routers = [SimRouter(number, fleet, seed + 2 * number) for number in range(cluster.routers)]
        self._lifecycle = Lifecycle(self, fleet, self._routers, self._finish)
        self._operations = Operations(self, fleet, self._routers, self._lifecycle)
        self._watch: Watch | None = None
        if controller is not None:
            self._watch = Watch(self, fleet, self._operations, self._routers[0], controller, interval_s)
        self._interval_s = interval_s
        self._door: Door | None = None
        if cluster.admission is not None:
            self._door = Door(cluster.admission, self.clock, self._lifecycle.place, self._finish)
        self._jobs: dict[Job, None] = {}
        self._numbers = count()
        self._counts: Counter[str] = Counter()
        self._arriving = True
        self._last_s = 0.0
        for number, spec in enumerate(cluster.workers):
            self._operations.start(f"{spec.role.value}-{number}", spec)

    def run(self, workload: Iterator[SimRequest], until_s: float) -> None:
        """Let everything happen up to `until_s`."""
        self._expect(workload)
        for failure in self.cluster.failures:
            self.clock.at(failure.at_s, self._operations.fail, failure)
        if self._watch is not None:
            self.clock.after(self._interval_s, self._look, self._watch)
        self.clock.run(until_s)

    def report(self, slo: Targets | None, until_s: float, price_per_gpu_hour: float | None) -> SimReport:
        """What came of it; nothing can happen after that."""
        workers = list(self._fleet.workers.values())
        totals = [*self._operations.totals, *(worker.close() for worker in workers)]
        for worker in workers:
            worker.die()
        for job in list(self._jobs):
            self._finish(job, "unfinished")
        span_s = self._last_s if until_s == inf else min(until_s, self.clock.now_s)
        for each in totals[len(self._operations.totals) :]:
            each.until_s = max(each.until_s, span_s)
        gpu_s = sum(t.gpus * max(0.0, min(t.until_s, span_s) - t.from_s) for t in totals)
        price = None
        if price_per_gpu_hour is not None and span_s:
            price = price_per_gpu_hour * gpu_s / span_s
        return SimReport(
            summary=summarize(self.records, slo, price),
            records=self.records,
            workers=totals,
            prompt_tokens=self._counts["prompt"],
            cached_tokens=self._counts["cached"],
            pulled_tokens=self._counts["pulled"],
            placements=dict(self._lifecycle.kinds),
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
        attempts = Attempts(self.cluster.placements, self.clock.now_s)
        job = Job(number, request, number % len(self._routers), attempts)
        self._jobs[job] = None
        if self._watch is not None:
            self._watch.arrived(request.prompt_tokens)
        self.clock.after(self.cluster.router_s, self._enter, job)

    def _enter(self, job: Job) -> None:
        if self._door is None:
            self._lifecycle.place(job)
        else:
            self._door.enter(job, self._routers[job.router])

    def _finish(self, job: Job, error: str = "") -> None:
        if job.ended:
            return
        job.ended = True
        del self._jobs[job]
        self._routers[job.router].release(job)
        record = job.record(error)
        self.records.append(record)
        if self._watch is not None:
            self._watch.finished(record)
        self._last_s = max(self._last_s, self.clock.now_s)
        if self._door is not None:
            self._door.left(job)

    def _look(self, watch: Watch) -> None:
        if self._jobs or self._arriving:
            watch.look(0 if self._door is None else self._door.waiting)
            self.clock.after(self._interval_s, self._look, watch)

    # ---- what workers say ---------------------------------------------------------------------

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
        message = WorkerEvents(
            worker.worker_id, str(worker.incarnation), next(worker.messages), False, tuple(events)
        )
        self.clock.after(self.cluster.network_s, self._index, worker, message)

    def _index(self, worker: SimWorker, message: WorkerEvents) -> None:
        if worker.alive:
            self._fleet.index.apply(message)
