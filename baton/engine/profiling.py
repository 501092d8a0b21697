"""How long do a worker's steps take when they follow each other, with its loop, scheduling and sampling?"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from itertools import pairwise
from statistics import median

from baton.engine.engine import Engine
from baton.engine.interfaces import Output
from baton.engine.sequence import Sequence
from baton.errors import BatonError
from baton.kv.events import Event
from baton.sampling import Sampling

_STEPS = 32
_PROMPTS = 5
_LONG_S = 1.0
_PATIENCE_S = 120.0


class StepClock:
    """An engine's observer that notes when steps end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps: list[tuple[float, int]] = []
        self._running = 0
        self._error = ""

    def outputs(self, outputs: list[Output]) -> None:
        """See `Observer`."""
        now_s = time.perf_counter()
        tokens = sum(output.sampled is not None for output in outputs)
        with self._changed:
            if tokens:
                self._steps.append((now_s, tokens))
            self._running -= sum(output.finish_reason is not None for output in outputs)
            self._error = next((output.error for output in outputs if output.error), self._error)
            self._changed.notify()

    def index_changed(self, events: list[Event]) -> None:
        """See `Observer`."""

    def died(self, error: BaseException) -> None:
        """See `Observer`."""
        with self._changed:
            self._error = repr(error)
            self._changed.notify()

    def run(self, engine: Engine, sequences: list[Sequence]) -> list[tuple[float, int]]:
        """When each step ended in which tokens came, and how many; first of all, when it began.

        Raises:
            BatonError: a step failed, or they took two minutes.
        """
        self._running, self._steps = len(sequences), [(time.perf_counter(), 0)]
        for sequence in sequences:
            engine.submit(sequence)
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0 or self._error, _PATIENCE_S)
            if self._running or self._error:
                why = self._error or f"{_PATIENCE_S:g} s have passed"
                raise BatonError(f"the engine did not end {len(sequences)} sequences: {why}")
            return self._steps


class Profiler:
    """Measures an engine that nobody else uses, and that `clock` observes."""

    def __init__(self, engine: Engine, clock: StepClock, block_size: int, vocabulary: int) -> None:
        self._engine = engine
        self._clock = clock
        self._block_size = block_size
        self._vocabulary = vocabulary
        self._made = 0

    def prefill(self, sizes: Iterable[int], budget_s: float) -> dict[int, float]:
        """Median seconds from a prompt's arrival to its token, by the prompt's tokens; the sizes, ascending,
        that can be measured in about `budget_s`."""
        curve: dict[int, float] = {}
        for size in sizes:
            seconds: list[float] = []
            while len(seconds) <= _PROMPTS and sum(seconds) < _LONG_S:
                (began_s, _), (ended_s, _) = self._clock.run(self._engine, [self._sequence(size, 1)])
                seconds.append(ended_s - began_s)
            curve[size] = median(seconds[1:] or seconds)
            budget_s -= sum(seconds)
            if budget_s < curve[size]:
                break
        return curve

    def decode(self, batches: Iterable[int], context: int, budget_s: float) -> dict[int, float]:
        """Median seconds of a step, by the requests in it, each with about `context` tokens; the batches,
        ascending, that the pool can hold and that can be measured in about `budget_s`."""
        curve: dict[int, float] = {}
        pool = self._engine.scheduler.pool
        for batch in batches:
            # Prompts are computed one after the other: the first goes on until all the others have begun.
            steps = _STEPS + batch * (1 + context // self._engine.scheduler.limits.max_batch_tokens)
            prompt = max(1, context - _STEPS // 2)
            if batch * -(-(prompt + steps) // self._block_size) > pool.total_blocks:
                break
            began_s = time.perf_counter()
            ends = self._clock.run(self._engine, [self._sequence(prompt, steps) for _ in range(batch)])
            full = [
                end_s - before_s
                for (before_s, before), (end_s, tokens) in pairwise(ends)
                if before == tokens == batch
            ]
            if not full:
                break
            curve[batch] = median(full)
            took_s = time.perf_counter() - began_s
            budget_s -= took_s
            if budget_s < 2 * took_s:
                break
        return curve

    def _sequence(self, prompt: int, outputs: int) -> Sequence:
        self._made += 1
        return Sequence(
            key=self._made,
            request_id="profile",
            tokens=[(7 * self._made + 11 * at) % self._vocabulary for at in range(prompt)],
            prompt_len=prompt,
            sampling=Sampling(max_tokens=outputs, temperature=0.0, ignore_eos=True),
            root=self._made.to_bytes(16, "little"),  # nothing is found cached
            block_size=self._block_size,
        )
