"""A simulated worker: the real scheduler, pool and reservations, stepping in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING, NamedTuple, Protocol

from baton.bench.records import Gaps
from baton.engine.reservations import Reservations
from baton.engine.scheduler import Limits, Scheduled, Scheduler
from baton.engine.sequence import State, Work
from baton.kv.events import Event
from baton.kv.pool import BlockPool
from baton.sim.clock import Clock
from baton.sim.cluster import SimCluster, WorkerSpec, WorkerTotals
from baton.sim.job import Job, SimSequence
from baton.sim.network import Card, Network
from baton.sim.speed import Chunk

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
    """What is being computed: one step, or a leap of `steps` in which the same sequences decode.

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
        if self.growth_s <= 0:
            steps = seconds / self.first_s
        else:
            half = self.first_s / self.growth_s - 0.5
            steps = sqrt(half * half + 2 * seconds / self.growth_s) - half
        return max(1, ceil(steps - 1e-9))


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
        self.scheduler = Scheduler(self.pool, limits)
        self.reservations = Reservations(self.scheduler)
        self.card = Card(spec.network_bytes_per_s)
        self.jobs: dict[Job, None] = {}
        self.handoffs: dict[Handoff, None] = {}
        self.pulls: dict[Pull, None] = {}
        self.prefill_curve = spec.speed.prefill_curve(spec.max_batch_tokens)
        self.decode_curve = spec.speed.decode_curve(spec.max_batch_requests)
        self.totals = WorkerTotals(worker_id, spec.gpus, world.clock.now_s, role=spec.role)
        self._world = world
        self._clock = world.clock
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
        """Compute nothing any more."""
        if self._step is not None:
            self.totals.busy_s += min(
                self._clock.now_s - self._step.began_s, self._step.seconds(self._step.steps)
            )
        self.alive = False
        self._step = None
        self.close()

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
        return LoadReport(
            self._clock.now_s,
            len(scheduler.running),
            len(scheduler.waiting) + self.reservations.waiting + self.reservations.reading,
            scheduler.queued_tokens,
            self.pool.available,
            self.pool.cached,
        )

    # ---- steps --------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin the next step, if there is one to compute."""
        if self._step is not None or not self.alive:
            return
        self.scheduler.admits = not self.reservations.waiting
        batch = self.scheduler.schedule()
        if not batch:
            return
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
        if chunks:
            step = _Step(batch, now_s, self.spec.speed.step_s(decoding, context, chunks))
        else:
            step = self._leap(batch, context)
        self._step = step
        self._clock.after(step.seconds(step.steps), self._end, step, step.turn)

    def _leap(self, batch: list[Scheduled], context: int) -> _Step:
        """As many steps as bring nothing but tokens: no end, no want of blocks.

        What waits to be admitted goes on waiting meanwhile: only an end makes room, or a call from
        outside, which shortens the leap.
        """
        fixed_s, per_token_s = self.spec.speed.decode_line(len(batch))
        step = _Step(batch, self._clock.now_s, fixed_s + per_token_s * context, per_token_s * len(batch))
        steps = _LONGEST_LEAP
        for item in batch:
            sequence = item.sequence
            left = sequence.sampling.max_tokens - len(sequence.tokens) + sequence.prompt_len
            if left < steps:
                steps = left
        if steps > 1:
            wanted = [
                max(0, sequence.blocks_for(len(sequence.tokens) + steps - 1) - len(sequence.blocks))
                for sequence in (item.sequence for item in batch)
            ]
            if sum(wanted) <= self.pool.available:
                for item, count in zip(batch, wanted, strict=True):
                    if count:
                        item.sequence.blocks += self.pool.allocate(count)
                step.steps = steps
        return step

    def _end(self, step: _Step, turn: int) -> None:
        if self._step is not step or step.turn != turn:
            return
        self._step = None
        now_s, totals = self._clock.now_s, self.totals
        totals.busy_s += now_s - step.began_s
        totals.steps += step.steps
        self._record(step, now_s)
        self.reservations.grant()
        self.publish()
        in_use = self.pool.pinned
        if in_use > totals.most_in_use:
            totals.most_in_use = in_use
        self._begin()
        self.note()

    def _record(self, step: _Step, now_s: float) -> None:
        scheduler, totals, steps = self.scheduler, self.totals, step.steps
        hops_s = 2 * self._world.cluster.network_s
        seen_s, began_s = now_s + hops_s, step.began_s + hops_s
        mean_s = (now_s - step.began_s) / steps
        in_a_row = 0
        for item in step.batch:
            sequence = item.sequence
            assert isinstance(sequence, SimSequence)
            decodes, samples = sequence.started and item.query_len == 1, item.samples
            if not decodes:
                totals.computed_tokens += item.query_len
            sequence.computed += steps - 1
            scheduler.advance(item)
            if sequence.cancelled:
                scheduler.release(sequence)
                continue
            if not samples:
                if sequence.work is Work.PREFILL:
                    _handoff(sequence).announce(final=False)
                continue
            job = sequence.job
            sequence.extend(steps)
            totals.output_tokens += steps
            if sequence.work is Work.PREFILL:
                self._prefilled(sequence, now_s)
                scheduler.hold(sequence)
                _handoff(sequence).sampled()
                continue
            if not sequence.started:
                self._prefilled(sequence, now_s)
                sequence.started = True
            if job.output == 0:
                job.first_s = seen_s
            elif job.last_s == began_s:
                job.gaps.append((mean_s, steps))
                in_a_row += steps
            else:
                # The first of the steps ends a longer gap, or a shorter one after the first token.
                first_s = began_s + step.first_s - job.last_s
                job.gaps.append((first_s, 1))
                self._world.gaps.add(first_s)
                if steps > 1:
                    job.gaps.append((mean_s, steps - 1))
                    in_a_row += steps - 1
            job.output += steps
            job.last_s = seen_s
            if sequence.finished:
                scheduler.release(sequence)
                del self.jobs[job]
                self._world.finished(job)
        if in_a_row:
            self._world.gaps.add(mean_s, in_a_row)

    def _prefilled(self, sequence: SimSequence, now_s: float) -> None:
        self._world.prefilled(sequence, self, now_s - sequence.first_scheduled_s)


def _handoff(sequence: object) -> Handoff:
    assert isinstance(sequence, SimSequence)
    assert sequence.handoff is not None
    return sequence.handoff
