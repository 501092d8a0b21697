"""One simulated request from its first placement to its last token, across every failure in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from baton.errors import BatonError
from baton.routing import Placement, Unplaceable
from baton.routing.attempts import SESSION_BROKEN
from baton.sim.fleet import Fleet
from baton.sim.handoff import Handoff, Pull
from baton.sim.job import Job, SimSequence
from baton.sim.router import SimRouter
from baton.sim.worker import SimWorker, World

UNAVAILABLE = "service_unavailable_error"


class Lifecycle:
    """Runs requests. `give_up` is called with a word for each that must end early."""

    def __init__(
        self,
        world: World,
        fleet: Fleet,
        routers: Sequence[SimRouter],
        give_up: Callable[[Job, str], None],
    ) -> None:
        self.kinds: Counter[str] = Counter()
        """How many placements there were of each kind."""
        self._world = world
        self._fleet = fleet
        self._routers = routers
        self._give_up = give_up
        self._waiting: dict[Job, float] = {}  # until when, in seconds

    def place(self, job: Job) -> None:
        """Choose workers for a request and send it there."""
        if job.ended:
            return
        job.attempt += 1
        try:
            placement = self._routers[job.router].place(job)
        except Unplaceable:
            self._wait(job)
            return
        self._waiting.pop(job, None)
        job.placement, job.placed_output = placement, job.output
        self._send(job, placement)

    def changed(self) -> None:
        """A worker came or changed: what waits may be placed now."""
        for job in list(self._waiting):
            self.place(job)

    def lost(self, job: Job, worker_id: str) -> None:
        """A worker died with the request."""
        job.attempt += 1
        self._again(job, worker_id, SESSION_BROKEN, self._world.cluster.detect_s)

    # ---- a placement --------------------------------------------------------------------------

    def _send(self, job: Job, placement: Placement) -> None:
        workers, pull, attempt = self._fleet.workers, placement.pull, job.attempt
        decode = workers[placement.decode.worker_id]
        decode.jobs[job] = None
        source = None if pull is None else workers[pull.worker.worker_id]
        blocks = 0 if pull is None else pull.blocks
        hop_s = self._world.cluster.network_s
        if placement.prefill is None:
            self.kinds["local"] += 1
            self._world.clock.after(hop_s, self._begin_local, job, attempt, decode, source, blocks)
            return
        self.kinds["remote"] += 1
        prefill = workers[placement.prefill.worker_id]

        def failed(reason: str) -> None:
            self._broken(job, attempt, prefill.worker_id, reason)

        handoff = Handoff(self._world, job, decode, prefill, source, blocks, failed)
        self._world.clock.after(hop_s, handoff.start)

    def _begin_local(
        self, job: Job, attempt: int, decode: SimWorker, source: SimWorker | None, blocks: int
    ) -> None:
        if job.attempt != attempt or job.ended or not decode.alive:
            return
        sequence = SimSequence(job, self._world.cluster.block_tokens)

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
            Pull(self._world, decode, source, sequence, blocks, submit).start()

    # ---- its end ------------------------------------------------------------------------------

    def _broken(self, job: Job, attempt: int, worker_id: str, reason: str) -> None:
        """A placement ended before its request did."""
        if job.attempt == attempt and not job.ended:
            self._again(job, worker_id, reason, self._world.cluster.network_s)

    def _again(self, job: Job, worker_id: str, reason: str, after_s: float) -> None:
        if job.placement is not None:
            decode = self._fleet.workers.get(job.placement.decode.worker_id)
            if decode is not None:
                decode.jobs.pop(job, None)
        tokens, broke = job.output - job.placed_output, reason == SESSION_BROKEN
        if job.attempts.failed(worker_id, tokens, self._world.clock.now_s, broke=broke):
            self._world.clock.after(after_s, self.place, job)
        else:
            self._give_up(job, reason)

    def _wait(self, job: Job) -> None:
        """Until the cluster changes, as long as the request may."""
        if job in self._waiting:
            return
        until_s = self._waiting[job] = self._world.clock.now_s + job.attempts.wait_s
        self._world.clock.after(job.attempts.wait_s, self._expire, job, until_s)

    def _expire(self, job: Job, until_s: float) -> None:
        if self._waiting.get(job) == until_s:
            del self._waiting[job]
            self._give_up(job, UNAVAILABLE)
