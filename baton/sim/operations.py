"""Simulated workers that come, go, fail and change, by plan or as a controller wants."""

from __future__ import annotations

from collections import Counter
from itertools import count

from baton.bench.records import RequestRecord
from baton.kv.events import WorkerEvents
from baton.sim.cluster import (
    Action,
    AddWorker,
    Controller,
    Failure,
    Observed,
    RemoveWorker,
    SetRole,
    WorkerSpec,
    WorkerTotals,
)
from baton.sim.fleet import Fleet
from baton.sim.lifecycle import Lifecycle
from baton.sim.router import SimRouter
from baton.sim.worker import SimWorker, World


class Operations:
    """Starts and stops workers. `totals` are of those that are gone."""

    def __init__(self, world: World, fleet: Fleet, routers: list[SimRouter], lifecycle: Lifecycle) -> None:
        self.totals: list[WorkerTotals] = []
        self._world = world
        self._fleet = fleet
        self._routers = routers
        self._lifecycle = lifecycle
        self._incarnations = count(1)

    def start(self, worker_id: str, spec: WorkerSpec) -> None:
        """A worker takes work from now on, unless there is one of that name."""
        if worker_id in self._fleet.workers:
            return
        worker = SimWorker(worker_id, next(self._incarnations), spec, self._world)
        self._fleet.join(worker)
        hello = WorkerEvents(worker_id, str(worker.incarnation), next(worker.messages), True, ())
        self._fleet.index.apply(hello)
        self._lifecycle.changed()

    def fail(self, failure: Failure) -> None:
        """A worker dies with all it holds."""
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
            self._lifecycle.lost(job, failure.worker_id)
        self._world.clock.after(failure.back_after_s, self.start, failure.worker_id, worker.spec)

    def drained(self) -> None:
        """Let workers go that were to and have nothing left to do."""
        for worker in [w for w in self._fleet.workers.values() if w.draining and w.idle]:
            self._gone(worker)

    def act(self, action: Action) -> None:
        """Do what a controller wants."""
        match action:
            case SetRole(worker_id, role):
                self._fleet.workers[worker_id].role = role
                self._fleet.changed()
                self._lifecycle.changed()
            case AddWorker(worker_id, spec, after_s):
                self._world.clock.after(after_s, self.start, worker_id, spec)
            case RemoveWorker(worker_id):
                self._fleet.workers[worker_id].draining = True
                self._fleet.changed()

    def _gone(self, worker: SimWorker) -> None:
        self._fleet.leave(worker.worker_id)
        for router in self._routers:
            router.forget(worker.worker_id)
        self.totals.append(worker.close())


class Watch:
    """Shows a controller the cluster every `interval_s`, and does what it answers."""

    def __init__(
        self,
        world: World,
        fleet: Fleet,
        operations: Operations,
        router: SimRouter,
        controller: Controller,
        interval_s: float,
    ) -> None:
        self._world = world
        self._fleet = fleet
        self._operations = operations
        self._router = router
        self._controller = controller
        self._interval_s = interval_s
        self._busy_s: dict[SimWorker, float] = {}
        self._arrived: Counter[str] = Counter()
        self._finished: list[RequestRecord] = []

    def arrived(self, prompt_tokens: int) -> None:
        """A request came."""
        self._arrived["requests"] += 1
        self._arrived["tokens"] += prompt_tokens

    def finished(self, record: RequestRecord) -> None:
        """A request ended, or failed."""
        self._finished.append(record)

    def look(self, waiting_at_the_door: int) -> None:
        """An interval is over."""
        self._operations.drained()
        workers = list(self._fleet.workers.values())
        spent_s = {worker: worker.busy_s() for worker in workers}
        lately_s = {worker: spent_s[worker] - self._busy_s.get(worker, 0.0) for worker in workers}
        observed = Observed(
            now_s=self._world.clock.now_s,
            interval_s=self._interval_s,
            workers=[self._router.view(worker) for worker in workers],
            busy={worker.worker_id: min(1.0, lately_s[worker] / self._interval_s) for worker in workers},
            arrived=self._arrived["requests"],
            arrived_prompt_tokens=self._arrived["tokens"],
            finished=self._finished,
            waiting_at_the_door=waiting_at_the_door,
        )
        self._busy_s, self._finished = spent_s, []
        self._arrived.clear()
        for action in self._controller(observed):
            self._operations.act(action)
