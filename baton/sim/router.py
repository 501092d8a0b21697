"""A simulated router: the real policies on what it knows of the workers, a little late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from baton.routing import ClusterView, Curve, Placement, Request, Role, Unplaceable, WorkerView, create_policy
from baton.routing.admission import Pace
from baton.routing.correction import Correction
from baton.routing.cost import compute_s
from baton.routing.expected import Coming, Expected
from baton.routing.nominees import Nominees
from baton.sim.fleet import Fleet, Promise
from baton.sim.job import Job
from baton.sim.worker import LoadReport, SimWorker

# These are the router's own: how many conversations are remembered, at which prompt length speed is read off
# curves, how many requests may wait at an idle decode worker.
_CONVERSATIONS = 65_536
_PROMPT_TOKENS = 512
_BATCH = 64


class _Made(NamedTuple):
    """What a view of a worker is made of."""

    load: LoadReport
    promised: tuple[int, int, int]
    curve: Curve
    role: Role
    draining: bool


@dataclass(eq=False, slots=True)
class _Hold:
    """What a placement promises to its workers."""

    promises: Sequence[Promise]
    coming: Coming | None


class SimRouter:
    """One router: its policy, what it has learnt, and where conversations were."""

    def __init__(self, number: int, fleet: Fleet, seed: int) -> None:
        self.number = number
        self._fleet = fleet
        self._cluster = fleet.cluster
        self._policy = create_policy(fleet.cluster.policy, Random(seed + 1))
        self._nominees = Nominees(Random(seed), fleet.cluster.weighed)
        self._correction = Correction()
        self._expected = Expected()
        self._conversations: dict[str, str] = {}
        self._known: dict[str, tuple[_Made, WorkerView]] = {}
        self._holds: dict[Job, _Hold] = {}

    def place(self, job: Job) -> Placement:
        """Choose workers for a request, and promise them the work.

        Raises:
            Unplaceable: no worker can take it now.
        """
        avoiding = job.attempts.avoiding
        for avoid in avoiding:
            try:
                return self._place(job, avoid)
            except Unplaceable as error:
                unplaceable = error
        raise unplaceable

    def _place(self, job: Job, avoid: frozenset[str]) -> Placement:
        asked, cluster = job.request, self._cluster
        request = Request(
            prompt_tokens=job.context_tokens,
            blocks=-(-(asked.prompt_tokens + asked.output_tokens) // cluster.block_tokens),
            block_size=cluster.block_tokens,
            block_bytes=cluster.block_bytes,
            held=self._fleet.index.lookup(asked.chain),
            expected=self._expected.lookup(asked.chain),
            avoid=avoid,
            slo=asked.slo,
            session=asked.session,
            session_worker=self._conversations.get(asked.session),
        )
        placement = self._choose(request)
        if asked.session:
            self._remember(asked.session, placement.decode.worker_id)
        self.release(job)
        coming = None
        if placement.compute_tokens > cluster.block_tokens:
            coming = self._expected.add(placement.computing.worker_id, asked.chain)
        self._holds[job] = _Hold(self._promise(placement, request), coming)
        return placement

    def _choose(self, request: Request) -> Placement:
        """What the policy makes of those that are weighed, or of all where none of those can take it."""
        workers = self._fleet.workers
        if self._policy.weighs:
            named = self._nominees.choose(
                self._fleet.roles, (request.held, request.expected), request.session_worker
            )
            if len(named) < len(workers):
                views = self._views(workers[worker_id] for worker_id in named if worker_id in workers)
                self._nominees.keep(views)
                try:
                    return self._policy.place(request, ClusterView(views))
                except Unplaceable:
                    pass
        return self._policy.place(request, ClusterView(self._views(workers.values())))

    def _views(self, workers: Iterable[SimWorker]) -> list[WorkerView]:
        return [self.view(worker) for worker in workers]

    def release(self, job: Job) -> None:
        """What the job's workers were promised they have by now, or will never have."""
        hold = self._holds.pop(job, None)
        if hold is not None:
            for promise in hold.promises:
                self._fleet.release(promise)
            if hold.coming is not None:
                self._expected.remove(hold.coming)

    def prefilled(self, job: Job, worker: SimWorker, cached_tokens: int, prefill_s: float) -> None:
        """Learn how far the worker's prefill curve is off; its work is promised no more."""
        self.release(job)
        predicted_s = compute_s(self._raw(worker), job.context_tokens, cached_tokens)
        self._correction.learn(worker.worker_id, predicted_s, prefill_s)

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        self._correction.forget(worker_id)
        self._expected.forget(worker_id)
        self._known.pop(worker_id, None)

    def view(self, worker: SimWorker) -> WorkerView:
        """A worker as this router sees it now."""
        worker_id = worker.worker_id
        load = worker.reported()
        promised = self._fleet.promised(worker_id, load, self.number)
        curve = self._correction.curve(worker_id, worker.prefill_curve)
        made = _Made(load, promised, curve, worker.role, worker.draining)
        known = self._known.get(worker_id)
        if known is not None and known[0] == made:
            return known[1]
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
            prefill_curve=curve,
            decode_curve=worker.decode_curve,
            itl_target_s=worker.spec.itl_target_s,
            step_factor=load.step_factor,
            read_bytes_per_s=self._fleet.read_rates(worker.spec.network_bytes_per_s),
        )
        self._known[worker_id] = made, view
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
        views = [view for view in self._views(self._fleet.workers.values()) if not view.draining]
        decoders = [view for view in views if view.role.decodes]
        return decoders, [view for view in views if view.role is Role.PREFILL] or decoders

    def _raw(self, worker: SimWorker) -> WorkerView:
        """The worker with its curve as measured."""
        return WorkerView(worker.worker_id, "", "", worker.role, 1, 1, prefill_curve=worker.prefill_curve)

    def _promise(self, placement: Placement, request: Request) -> list[Promise]:
        decode, computing = placement.decode.worker_id, placement.computing.worker_id
        promises = [
            Promise(
                worker_id,
                self._fleet.clock.now_s,
                self.number,
                requests=1 if worker_id == decode else 0,
                queued_tokens=placement.compute_tokens if worker_id == computing else 0,
                blocks=max(0, request.prompt_blocks - request.held.get(worker_id, 0)),
            )
            for worker_id in sorted({decode, computing})
        ]
        for promise in promises:
            self._fleet.promise(promise)
        return promises

    def _remember(self, session: str, worker_id: str) -> None:
        self._conversations.pop(session, None)
        self._conversations[session] = worker_id
        if len(self._conversations) > _CONVERSATIONS:
            del self._conversations[next(iter(self._conversations))]
