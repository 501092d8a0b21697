"""The engine loop: one thread that schedules, computes and reports steps, and the calls others make.

One lock guards scheduler and pool. It is held to schedule and to record a step, not to compute it, so
calls from the worker's event loop return at once.

With `overlap`, the next step is scheduled and begun while the device computes the last one. Its new tokens
stay on the device, where the next step takes them; that one of them ended its sequence is found a step
late, and what that step brought is dropped. A step samples only when everything before it is recorded, so
what comes out is the same either way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import InitVar, dataclass, field

from baton.engine.costs import Tally
from baton.engine.freezing import Freezer
from baton.engine.interfaces import (
    BlockRange,
    Load,
    Observer,
    Output,
    Step,
    StepResult,
    StepRunner,
    TierMover,
)
from baton.engine.reservations import Pinned, Reservation, Reservations
from baton.engine.sampler import Sampled
from baton.engine.scheduler import Load as TierLoad
from baton.engine.scheduler import Scheduled, Scheduler
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import State, Work
from baton.engine.tiering import Tiering
from baton.kv.events import Tier
from baton.sampling import FinishReason

log = logging.getLogger(__name__)

THREAD = "engine"
"""Name of the thread that runs the loop."""


@dataclass(frozen=True)
class Stop:
    """What ends a generation besides its own parameters."""

    eos_token_ids: frozenset[int]
    max_model_len: int


@dataclass(frozen=True)
class _Running:
    """A step that the device computes, and what is in it."""

    batch: list[Scheduled]
    step: Step
    begun_s: float


@dataclass
class Engine:
    """Runs sequences until they finish, are cancelled, or the engine stops."""

    scheduler: Scheduler
    runner: StepRunner
    observer: Observer
    stop_rule: Stop
    mover: InitVar[TierMover | None] = None
    overlap: bool = False
    tally: Tally = field(default_factory=Tally, init=False)
    tiering: Tiering = field(init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _stopping: bool = field(default=False, init=False)
    _step_ended_s: float = field(default=0.0, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _reservations: Reservations = field(init=False)
    _freezer: Freezer = field(init=False)

    def __post_init__(self, mover: TierMover | None) -> None:
        self.tiering = Tiering(self.scheduler.pool, mover, self._changed, self._moved)
        self._reservations = Reservations(self.scheduler)
        self._freezer = Freezer(self.scheduler)
        self.scheduler.max_model_len = self.stop_rule.max_model_len

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the step being computed; sequences are abandoned."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    # ---- sequences ----------------------------------------------------------------------------

    def submit(self, choice: Choice) -> None:
        """Queue a sequence.

        Raises:
            PoolTooSmall, Overloaded: see `Scheduler.submit`.
        """
        with self._changed:
            choice.arrived_s = time.monotonic()
            self.scheduler.submit(choice)
            self._changed.notify()

    def cancel(self, choice: Choice) -> None:
        """Take a sequence out and free its blocks, after the running steps if it is part of them.

        Also how a reader's lease on finished prefill work ends. Nothing happens if it is finished.
        """
        with self._changed:
            if choice.state is State.LOADING or (choice.state is State.HOLDING and choice.frozen):
                choice.cancelled = True
            elif choice.state not in (State.ENDING, State.FINISHED):
                self.scheduler.release(choice)
                self._reservations.grant()
                self._changed.notify()

    def withdraw(self, choice: Choice) -> bool:
        """Cancel a sequence that waits, or whose prompt is computed for nobody else; False if it goes on."""
        with self._changed:
            waits = choice.state in (State.WAITING, State.LOADING)
            prefills = choice.state is State.RUNNING and choice.work is Work.GENERATE and not choice.decodes
            if waits or prefills:
                self.cancel(choice)
            return waits or prefills

    # ---- sequences that move ------------------------------------------------------------------

    def pin_computed(self, choice: Choice) -> Pinned | None:
        """Pin the complete blocks of a sequence, for the worker that takes it over; None when it does not
        decode."""
        with self._changed:
            if choice.state is not State.RUNNING or not choice.decodes:
                return None
            return self._reservations.pin(choice.chain(choice.shared))

    def freeze(self, choice: Choice) -> Future[bool]:
        """Stop a decoding sequence after the steps it is in, with all they brought reported.

        The future always comes to a result: whether it has stopped. `thaw` must follow in either case; until
        then nothing writes to its blocks or frees them.
        """
        with self._changed:
            asked = self._freezer.freeze(choice)
            self._changed.notify()
            return asked

    def thaw(self, choice: Choice) -> None:
        """Let a frozen sequence go on, or end it if it was cancelled meanwhile."""
        with self._changed:
            self._freezer.thaw(choice)
            self._reservations.grant()
            self._changed.notify()

    # ---- blocks for handoffs ------------------------------------------------------------------

    def pin_prefix(self, chain: Sequence[bytes]) -> Reservation:
        """Pin the leading blocks of `chain` that are cached here."""
        with self._changed:
            return self._reservations.pin_prefix(chain)

    def reserve(self, reservation: Reservation, total: int) -> Future[None]:
        """Extend a reservation to `total` blocks, in the order asked, as soon as they can be had.

        The future fails with HandoffFailed when the blocks can never be had because waiting
        reservations pin them.
        """
        with self._changed:
            return self._reservations.reserve(reservation, total)

    def adopt(self, reservation: Reservation, choice: Choice) -> None:
        """Decode a sequence whose context, but for its last token, was read into the reservation."""
        with self._changed:
            self._reservations.hand_over(reservation, choice.blocks_for(len(choice.tokens)))
            self.scheduler.adopt(choice, reservation.blocks, reservation.held)
            choice.decoding_since_s = time.monotonic()
            self._move([])
            self._changed.notify()

    def drop(self, reservation: Reservation) -> None:
        """Give the reservation's blocks back. Nothing may write to them any more."""
        with self._changed:
            self._reservations.drop(reservation)
            self._changed.notify()

    def pin(self, chain: Sequence[bytes]) -> Pinned:
        """Pin the leading blocks of `chain` that are cached here, for a peer to read or to read more."""
        with self._changed:
            return self._reservations.pin(chain)

    def pin_all(self, chain: Sequence[bytes]) -> Future[Pinned]:
        """As `pin`, after bringing up what of the chain lies in lower tiers, as far as there is room.

        The future always comes to a result and cannot be cancelled: `unpin` it.
        """
        with self._changed:
            done, load = self._reservations.pin_all(chain)
            self._move([] if load is None else [load])
            return done

    def extend(self, pinned: Pinned, count: int) -> bool:
        """Add `count` private blocks to read into; False, and none added, when that would mean waiting."""
        with self._changed:
            return self._reservations.extend(pinned, count)

    def share(self, pinned: Pinned, chain: Sequence[bytes]) -> None:
        """Let every request use the pinned blocks, which now hold the KV of `chain`'s blocks."""
        with self._changed:
            self._reservations.share(pinned, chain)
            self._move([])

    def unpin(self, pinned: Pinned) -> None:
        """Let the blocks go. Nobody may read them or write to them any more."""
        with self._changed:
            self._reservations.unpin(pinned)
            self._changed.notify()

    # ---- what others may know -----------------------------------------------------------------

    def load(self) -> Load:
        with self._changed:
            scheduler, pool = self.scheduler, self.scheduler.pool
            return Load(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting) + len(scheduler.loading) + self._reservations.waiting,
                reading=self._reservations.reading,
                queued_tokens=scheduler.queued_tokens,
                total_blocks=pool.total_blocks,
                free_blocks=pool.available,
                cached_blocks=pool.cached,
                pinned_blocks=pool.pinned,
                host_blocks=pool.lower.count(Tier.HOST) if pool.lower else 0,
                disk_blocks=pool.lower.count(Tier.DISK) if pool.lower else 0,
                step_factor=scheduler.pace.factor,
            )

    def held_ids(self) -> dict[Tier, list[bytes]]:
        """Identities of all shareable blocks held, by tier, parents first."""
        with self._changed:
            return self.scheduler.pool.held_ids()

    # ---- the loop -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            running: _Running | None = None
            while (batch := self._next_batch(wait=running is None)) or running:
                begun = self._begin(batch, running) if batch else None
                if running is not None:
                    self._end(running)
                running = self._sample(begun) if begun is not None else None
                if running is not None and not self.overlap:
                    self._end(running)
                    running = None
        except BaseException as error:
            log.exception("the engine died")
            self.observer.died(error)

    def _next_batch(self, *, wait: bool) -> list[Scheduled]:
        """The next step; empty when stopping or, unless told to wait for one, when there is none now."""
        while True:
            with self._changed:
                if self._stopping:
                    return []
                self._freezer.settle()
                early = self._expire()
                self.scheduler.admits = not self._reservations.waiting
                batch = self.scheduler.schedule()
                self._move(self.scheduler.take_loads())
                if batch:
                    now = time.monotonic()
                    for item in batch:
                        item.sequence.first_scheduled_s = item.sequence.first_scheduled_s or now
                    early += [Output(s, ready=r) for s in _choices(batch) if (r := _newly_ready(s))]
                elif wait and not early:
                    with self.tally.idle():
                        self._changed.wait()
            if early:
                self.observer.outputs(early)
            if batch or not wait:
                return batch

    def _expire(self) -> list[Output]:
        """End what nobody waits for any more."""
        late = self.scheduler.expired(time.monotonic())
        for choice in late:
            if choice.state is State.RUNNING:
                self._drop(choice)
            else:
                self.scheduler.release(choice)
        if late:
            self._reservations.grant()
        return [Output(choice, error="its time is over", expired=True) for choice in late]

    def _begin(self, batch: list[Scheduled], running: _Running | None) -> _Running | None:
        begun_s = time.monotonic()
        try:
            step = self.runner.begin(batch) if running is None else running.step.then(batch)
        except Exception as error:
            self._fail(batch, error)
            return None
        return _Running(batch, step, begun_s)

    def _sample(self, begun: _Running) -> _Running | None:
        try:
            begun.step.sample()
        except Exception as error:
            self._fail(begun.batch, error)
            return None
        return begun

    def _end(self, running: _Running) -> None:
        try:
            results = running.step.results()
        except Exception as error:
            self._fail(running.batch, error)
        else:
            began_s, self._step_ended_s = max(running.begun_s, self._step_ended_s), time.monotonic()
            if outputs := self._record(running.batch, results, self._step_ended_s - began_s):
                self.observer.outputs(outputs)

    def _record(self, batch: list[Scheduled], results: Sequence[StepResult], took_s: float) -> list[Output]:
        outputs = []
        with self._changed:
            self.tally.steps += 1
            self.scheduler.learn(batch, took_s)
            for item, result in zip(batch, results, strict=True):
                choice = item.sequence
                self.tally.count(item)
                if not choice.started:
                    choice.chunks.append((item.query_len, time.monotonic()))
                self.scheduler.advance(item)
                if choice.state is not State.RUNNING:
                    continue  # over since the step began
                choice.prompt_logprobs += result.prompt_logprobs
                if result.sampled is not None:
                    outputs.append(self._token(choice, result.sampled))
                elif ready := _newly_ready(choice):
                    outputs.append(Output(choice, ready=ready))
            self._reservations.grant()
            self._move([])
        return outputs

    def _token(self, choice: Choice, sampled: Sampled) -> Output:
        """Append a new token and settle what becomes of its sequence."""
        first, choice.started = not choice.started, True
        choice.append(sampled.token_id)
        by_id = sampled.token_id in choice.sampling.stop_token_ids
        reason = self._finish_reason(choice, sampled.token_id)
        complete = False
        if choice.guide is not None:
            complete = reason is not FinishReason.STOP and choice.guide.complete(choice.tokens)
            if choice.guide.failure:
                self._drop(choice)
                return Output(choice, error=choice.guide.failure, misguided=True)
            reason = FinishReason.STOP if complete else reason
        ready = None
        if choice.work is Work.PREFILL:
            ready = _newly_ready(choice, final=True) if reason is None else None
            self.scheduler.hold(choice)
        elif reason is not None:
            self.scheduler.release(choice)
        now = time.monotonic()
        if first:
            choice.decoding_since_s = now
        return Output(
            choice,
            sampled,
            reason,
            stopped_by_token_id=by_id and reason is FinishReason.STOP,
            complete=complete,
            prompt_logprobs=tuple(choice.prompt_logprobs) if first else (),
            ready=ready,
            first=first,
            queue_s=choice.first_scheduled_s - choice.arrived_s if first else 0.0,
            prefill_s=now - choice.first_scheduled_s if first else 0.0,
        )

    def _finish_reason(self, choice: Choice, token: int) -> FinishReason | None:
        sampling = choice.sampling
        if token in sampling.stop_token_ids:
            return FinishReason.STOP
        if token in self.stop_rule.eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if choice.output_len >= sampling.max_tokens or len(choice.tokens) >= self.stop_rule.max_model_len:
            return FinishReason.LENGTH
        return None

    def _fail(self, batch: list[Scheduled], error: Exception) -> None:
        log.error("engine step failed; its %d requests end with an error", len(batch), exc_info=error)
        failed = []
        with self._changed:
            for item in batch:
                choice = item.sequence
                self.scheduler.abandon(item)
                if choice.state is not State.RUNNING:
                    continue  # over since the step began
                self._drop(choice)
                failed.append(Output(choice, error=repr(error)))
            self._reservations.grant()
        if failed:
            self.observer.outputs(failed)

    def _drop(self, choice: Choice) -> None:
        """End a running sequence that has failed."""
        if choice.work is Work.PREFILL:
            self.scheduler.hold(choice)  # a reader may still be reading what was announced
        else:
            self.scheduler.release(choice)

    def _move(self, loads: Sequence[TierLoad]) -> None:
        """Start what is to move between tiers now, and publish what has changed."""
        self.tiering.start(loads)
        if events := self.scheduler.pool.take_events():
            self.observer.index_changed(events)

    def _moved(self) -> None:
        self._move([])
        self._reservations.grant()
        self._changed.notify()


def _choices(batch: list[Scheduled]) -> list[Choice]:
    return [item.sequence for item in batch]


def _newly_ready(choice: Choice, *, final: bool = False) -> BlockRange | None:
    """Blocks of a sequence prefilled for another worker that are complete and were not yet named.

    A request that is known to end with its first token moves no KV.
    """
    if choice.work is not Work.PREFILL or choice.output_len + (not final) >= choice.sampling.max_tokens:
        return None
    complete = len(choice.blocks) if final else choice.shared
    if complete <= choice.announced:
        return None
    ready = BlockRange(choice.announced, tuple(choice.blocks[choice.announced : complete]))
    choice.announced = complete
    return ready
