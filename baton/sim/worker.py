"""A simulated worker: the real scheduler, pool and reservations, stepping in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil, floor, sqrt
from typing import TYPE_CHECKING, NamedTuple, Protocol

from baton.bench.records import Gaps
from baton.engine.reservations import Reservations
from baton.engine.scheduler import Limits, Scheduled
from baton.engine.sequence import State, Work
from baton.kv.events import Event
from baton.kv.pool import BlockPool
from baton.routing.pacing import Pace
from baton.sim.clock import Clock
from baton.sim.cluster import SimCluster, WorkerSpec, WorkerTotals
from baton.sim.job import Job, SimSequence
from baton.sim.network import Card, Network
from baton.sim.speed import Chunk
from baton.sim.steady import Steady

if TYPE_CHECKING:
    from baton.sim.handoff import Handoff, Pull

_LONGEST_LEAP = 256


class LoadReport(NamedTuple):
    """What a worker tells routers of itself; fields as in `WorkerView`."""

    at_s: float
    running: int
    waiting: int
    queued_tokens: int
    free_blocks: int
    cached_blocks: int
    step_factor: float


class World(Protocol):
    """What workers share, and whom they tell."""

    clock: Clock
    network: Network
    cluster: SimCluster
    gaps: Gaps

    def prefilled(self, sequence: SimSequence, worker: SimWorker, prefill_s: float) -> None:
        """The prompt is computed, and the first token sampled."""

    def finished(self, job: Job) -> None:
        """The last token is out."""

    def published(self, worker: SimWorker, events: Sequence[Event]) -> None:
        """Blocks were stored or removed."""


@dataclass(eq=False, slots=True)
class _Step:
    """What is being computed: `batch` in one step, or, with an empty one, a leap of `steps` in which the
    worker's steady sequences decode.

    The first takes `first_s`, each further one `growth_s` more than the one before. `turn` tells the
    current end from those that a shortened leap outlived.
    """

    batch: list[Scheduled]
    began_s: float
    first_s: float
    growth_s: float = 0.0
    steps: int = 1
    turn: int = 0

    def seconds(self, steps: int) -> float:
        return steps * self.first_s + self.growth_s * steps * (steps - 1) / 2

    def steps_until(self, seconds: float) -> int:
        """Whole steps that end at or after so many seconds: the one under way is finished."""
        return max(1, ceil(self._steps_in(seconds) - 1e-9))

    def steps_within(self, seconds: float) -> int:
        """Whole steps that end within so many seconds."""
        return min(self.steps, floor(self._steps_in(seconds) + 1e-9))

    def _steps_in(self, seconds: float) -> float:
        if self.growth_s <= 0:
            return seconds / self.first_s
        half = self.first_s / self.growth_s - 0.5
        return sqrt(half * half + 2 * seconds / self.growth_s) - half


class SimWorker:
    """One incarnation of a worker, from its start to its end or death."""

    def __init__(self, worker_id: str, incarnation: int, spec: WorkerSpec, world: World) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.spec = spec
        self.role = spec.role
        self.draining = False
        self.alive = True
        self.pool = BlockPool(spec.kv_blocks)
        limits = Limits(spec.max_batch_tokens, spec.max_batch_requests, spec.max_waiting)
        self.prefill_curve = spec.speed.prefill_curve(spec.max_batch_tokens)
        self.decode_curve = spec.speed.decode_curve(spec.max_batch_requests)
        pace = Pace(spec.itl_target_s, self.prefill_curve, self.decode_curve)
        self.scheduler = spec.scheduler(self.pool, limits, pace)
        self.reservations = Reservations(self.scheduler)
        self.card = Card(spec.network_bytes_per_s)
        self.messages = count(1)
        """Numbers what it tells the index."""
        self.jobs: dict[Job, None] = {}
        self.handoffs: dict[Handoff, None] = {}
        self.pulls: dict[Pull, None] = {}
        self.totals = WorkerTotals(worker_id, spec.gpus, world.clock.now_s, role=spec.role)
        self._world = world
        self._clock = world.clock
        self._steady = Steady(self.scheduler, world.gaps)
        self._adopted: list[SimSequence] = []
        self._computes_prompts = False
        self._step: _Step | None = None
        self._reports = deque([self._report_now()])

    # ---- what others ask of it ----------------------------------------------------------------

    def submit(self, sequence: SimSequence) -> None:
        """Queue a sequence.

        Raises:
            PoolTooSmall, Overloaded: see `Scheduler.submit`.
        """
        sequence.arrived_s = self._clock.now_s
        self.scheduler.submit(sequence)
        self.changed()

    def adopt(self, sequence: SimSequence, blocks: list[int], held: int) -> None:
        """Decode a sequence whose KV is there, see `Scheduler.adopt`."""
        self.scheduler.adopt(sequence, blocks, held)
        self._adopted.append(sequence)
        self.publish()
        self.changed()

    def cancel(self, sequence: SimSequence) -> None:
        """Take a sequence out, after the running step if it is part of it."""
        if sequence.in_flight:
            sequence.cancelled = True
        elif sequence.state is not State.FINISHED:
            self.scheduler.release(sequence)
            self.freed()

    def freed(self) -> None:
        """Blocks or places came free."""
        self.reservations.grant()
        if self.scheduler.waiting or self._step is None:
            self.changed()

    def changed(self) -> None:
        """There is something else to compute: shorten the leap, or begin a step."""
        self.note()
        step = self._step
        if step is None:
            self._begin()
        elif step.steps > 1:
            steps = step.steps_until(self._clock.now_s - step.began_s)
            if steps < step.steps:
                step.steps = steps
                step.turn += 1
                self._clock.at(step.began_s + step.seconds(steps), self._end, step, step.turn)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.jobs or self.handoffs or self.pulls)

    def die(self) -> None:
        """Compute nothing any more; clients have the tokens of every step that has ended."""
        step, now_s = self._step, self._clock.now_s
        self._step = None
        if step is not None:
            self.totals.busy_s += min(now_s - step.began_s, step.seconds(step.steps))
            if not step.batch and (done := step.steps_within(now_s - step.began_s)):
                self._advance(step, done, step.began_s + step.seconds(done))
        self._steady.dissolve()
        self.alive = False

    def close(self) -> WorkerTotals:
        """The totals, up to now."""
        totals = self.totals
        totals.until_s = self._clock.now_s
        totals.role = self.role
        totals.preemptions = self.scheduler.preemptions
        totals.sent_bytes, totals.received_bytes = self.card.sent, self.card.received
        return totals

    def busy_s(self) -> float:
        """Seconds of computing so far, those of a step under way included."""
        step = self._step
        under_way_s = self._clock.now_s - step.began_s if step else 0.0
        return self.totals.busy_s + under_way_s

    # ---- what routers know of it --------------------------------------------------------------

    def note(self) -> None:
        """Keep the load as it is now, for routers that look later."""
        reports, cluster = self._reports, self._world.cluster
        now = self._report_now()
        if reports[-1].at_s == now.at_s:
            reports[-1] = now
        else:
            reports.append(now)
        old_s = now.at_s - cluster.network_s - cluster.beat_s
        while len(reports) > 1 and reports[1].at_s <= old_s:
            reports.popleft()

    def reported(self) -> LoadReport:
        """The last load that has reached the routers."""
        cluster = self._world.cluster
        sent_s = self._clock.now_s - cluster.network_s
        if not self.role.decodes:
            sent_s = sent_s // cluster.beat_s * cluster.beat_s
        reports = self._reports
        while len(reports) > 1 and reports[1].at_s <= sent_s:
            reports.popleft()
        return reports[0]

    def publish(self) -> None:
        """Tell the index what was stored and removed."""
        if events := self.pool.take_events():
            self._world.published(self, events)

    def _report_now(self) -> LoadReport:
        scheduler = self.scheduler
        prompts = scheduler.waiting or self._computes_prompts
        return LoadReport(
            self._clock.now_s,
            len(scheduler.running),
            len(scheduler.waiting) + self.reservations.waiting + self.reservations.reading,
            scheduler.queued_tokens if prompts else 0,
            self.pool.available,
            self.pool.cached,
            scheduler.pace.factor,
        )

    # ---- steps --------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin the next step, if there is one to compute."""
        if self._step is not None or not self.alive:
            return
        step = self._go_on() or self._schedule()
        self._adopted.clear()
        if step is not None:
            self._step = step
            self._clock.after(step.seconds(step.steps), self._end, step, step.turn)

    def _go_on(self) -> _Step | None:
        """A leap of who decodes already and who was adopted since; None if the scheduler has to choose.

        It would choose just them: nobody waits, all may run together, and there are blocks for all.
        """
        steady, scheduler, limits = self._steady, self.scheduler, self.scheduler.limits
        together = len(steady) + len(self._adopted)
        if not len(steady) or scheduler.waiting or together != len(scheduler.running):
            return None
        if together > min(limits.max_batch_requests, limits.max_batch_tokens):
            return None
        if self.pool.available < together:
            return None
        for sequence in self._adopted:
            steady.join(sequence)
        return self._leap()

    def _schedule(self) -> _Step | None:
        """The step that the scheduler chooses; None if there is nothing to compute."""
        steady, scheduler = self._steady, self.scheduler
        steady.dissolve()
        scheduler.admits = not self.reservations.waiting
        batch = scheduler.schedule()
        now_s = self._clock.now_s
        context = decoding = 0
        chunks = []
        for item in batch:
            sequence = item.sequence
            if item.query_len == 1 and sequence.started:
                decoding += 1
                context += len(sequence.tokens)
                continue
            chunks.append(Chunk(sequence.computed, item.query_len))
            if not sequence.first_scheduled_s:
                sequence.first_scheduled_s = now_s
                if sequence.work is Work.PREFILL:
                    _handoff(sequence).announce(final=False)
        self._computes_prompts = bool(chunks)
        if chunks:
            return _Step(batch, now_s, self.spec.speed.step_s(decoding, context, chunks))
        for item in batch:
            assert isinstance(item.sequence, SimSequence)
            scheduler.abandon(item)
            steady.join(item.sequence)
        return self._leap() if batch else None

    def _leap(self) -> _Step:
        """As many steps as bring nothing but tokens: no end, no want of blocks.

        What waits to be admitted goes on waiting meanwhile: only an end makes room, or a call from
        outside, which shortens the leap.
        """
        steady = self._steady
        fixed_s, per_token_s = self.spec.speed.decode_line(len(steady))
        first_s, growth_s = fixed_s + per_token_s * steady.context, per_token_s * len(steady)
        return _Step([], self._clock.now_s, first_s, growth_s, steady.plan(_LONGEST_LEAP))

    def _end(self, step: _Step, turn: int) -> None:
        if self._step is not step or step.turn != turn:
            return
        self._step = None
        now_s, totals = self._clock.now_s, self.totals
        took_s = now_s - step.began_s
        totals.busy_s += took_s
        if step.batch:
            self.scheduler.learn(step.batch, took_s)
            self._record(step, now_s)
        else:
            self.scheduler.learn_steps(len(self._steady), 0, took_s / step.steps, step.steps)
            self._advance(step, step.steps, now_s)
        self.reservations.grant()
        self.publish()
        in_use = self.pool.pinned
        if in_use > totals.most_in_use:
            totals.most_in_use = in_use
        self._begin()
        self.note()

    def _advance(self, step: _Step, steps: int, ended_s: float) -> None:
        """The first `steps` of a leap have ended."""
        hops_s = 2 * self._world.cluster.network_s
        self.totals.steps += steps
        self.totals.output_tokens += steps * len(self._steady)
        for sequence in self._steady.advance(steps, step.began_s + hops_s, step.first_s, ended_s + hops_s):
            self._finish(sequence)

    def _record(self, step: _Step, now_s: float) -> None:
        """A step of prompts, and perhaps of decodes beside them, has ended."""
        scheduler, totals = self.scheduler, self.totals
        totals.steps += 1
        seen_s = now_s + 2 * self._world.cluster.network_s
        for item in step.batch:
            sequence = item.sequence
            assert isinstance(sequence, SimSequence)
            if not sequence.started or item.query_len > 1:
                totals.computed_tokens += item.query_len
            scheduler.advance(item)
            if sequence.cancelled:
                scheduler.release(sequence)
                continue
            if not item.samples:
                if sequence.work is Work.PREFILL:
                    _handoff(sequence).announce(final=False)
                continue
            job = sequence.job
            sequence.extend(1)
            totals.output_tokens += 1
            if sequence.work is Work.PREFILL:
                self._prefilled(sequence, now_s)
                scheduler.hold(sequence)
                _handoff(sequence).sampled()
                continue
            if not sequence.started:
                self._prefilled(sequence, now_s)
                sequence.started = True
            job.take_token(seen_s, self._world.gaps)
            if sequence.finished:
                self._finish(sequence)

    def _finish(self, sequence: SimSequence) -> None:
        self.scheduler.release(sequence)
        del self.jobs[sequence.job]
        self._world.finished(sequence.job)

    def _prefilled(self, sequence: SimSequence, now_s: float) -> None:
        self._world.prefilled(sequence, self, now_s - sequence.first_scheduled_s)


def _handoff(sequence: object) -> Handoff:
    assert isinstance(sequence, SimSequence)
    assert sequence.handoff is not None
    return sequence.handoff
