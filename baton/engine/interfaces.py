"""Whom the engine works with: what computes steps, what moves blocks, and who hears of the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.engine.sampler import Sampled
from baton.engine.scheduler import Scheduled
from baton.engine.sequence import Sequence as Choice
from baton.kv.events import Event
from baton.kv.lower import Held, Spill
from baton.sampling import FinishReason, PositionLogprobs


@dataclass(frozen=True)
class BlockRange:
    """Pool blocks whose KV is complete; the first is number `first_index` of its chain."""

    first_index: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """What one step brought one sequence. `error` ends it without a finish reason, and so does its deadline,
    when it has `expired`, or its guide, when it is `misguided`. When it is `complete`, nothing may follow the
    last token; where a stop token ends it, that is no part of the answer."""

    choice: Choice
    sampled: Sampled | None = None
    finish_reason: FinishReason | None = None
    stopped_by_token_id: bool = False
    complete: bool = False
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    ready: BlockRange | None = None
    first: bool = False
    queue_s: float = 0.0
    prefill_s: float = 0.0
    error: str = ""
    expired: bool = False
    misguided: bool = False


@dataclass(frozen=True)
class Load:
    """How busy the engine is; fields as in the WorkerLoad message, which counts `reading`, the requests whose
    KV is being read from a prefill worker, among those that wait."""

    running: int
    waiting: int
    queued_tokens: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    pinned_blocks: int
    host_blocks: int = 0
    disk_blocks: int = 0
    reading: int = 0
    step_factor: float = 1.0


class StepResult(Protocol):
    """What a step brought one scheduled sequence; see `baton.engine.runner.Result`."""

    @property
    def sampled(self) -> Sampled | None: ...

    @property
    def prompt_logprobs(self) -> list[PositionLogprobs]: ...


class Step(Protocol):
    """A step that the device computes.

    `sample` is called once, when what the steps before it brought is recorded in the sequences: only then
    is it known what to penalise. `results` waits for the device; they are in batch order. `then` begins the
    next step, with the tokens that this one has sampled and nobody has seen yet; call it after `sample`.
    """

    def sample(self) -> None: ...

    def results(self) -> Sequence[StepResult]: ...

    def then(self, batch: Sequence[Scheduled]) -> Step: ...


class StepRunner(Protocol):
    """What computes steps; see `baton.engine.runner.Runner`."""

    def begin(self, batch: Sequence[Scheduled]) -> Step: ...


class TierMover(Protocol):
    """What moves blocks between tiers on threads of its own; see `baton.tiers.store.TierStore`."""

    def fetch(
        self, held: Sequence[Held], blocks: Sequence[int], done: Callable[[Sequence[str]], None]
    ) -> None: ...

    def spill(self, spills: Sequence[Spill], done: Callable[[Spill, bool], None]) -> None: ...


class Observer(Protocol):
    """Whom the engine tells, from its own thread."""

    def outputs(self, outputs: list[Output]) -> None: ...

    def index_changed(self, events: list[Event]) -> None: ...

    def died(self, error: BaseException) -> None: ...
