"""An engine over a fake model, whose next token is a function of the whole context.

So a wrong block, a lost token or a bad resume shows as a wrong token.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from baton.engine.engine import Engine, Stop
from baton.engine.interfaces import Output
from baton.engine.sampler import Sampled
from baton.engine.scheduler import Limits, Scheduled, Scheduler
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import Work
from baton.kv.events import Event
from baton.kv.pool import BlockPool
from baton.sampling import FinishReason, Sampling

BLOCK = 4
VOCAB = 50
LIMITS = Limits(max_batch_tokens=16, max_batch_requests=8, max_waiting=100)


def next_token(context: Sequence[int]) -> int:
    return (sum((i + 1) * t for i, t in enumerate(context)) * 31 + len(context)) % VOCAB


@dataclass(frozen=True)
class FakeResult:
    sampled: Sampled | None
    prompt_logprobs: list = field(default_factory=list)


class FakeModel:
    """Keeps 'KV' (the token itself) by pool block and computes from that, not from the sequence.

    A step sees the blocks and tokens that there were when it began, and computes when its results are asked
    for, as late as a device may: a block given away too early shows as a wrong token.
    """

    def __init__(self, blocks: int) -> None:
        self.memory = [[-1] * BLOCK for _ in range(blocks)]
        self.failing = 0

    def begin(self, batch: Sequence[Scheduled]) -> FakeStep:
        return FakeStep(self, batch, None)


class FakeStep:
    def __init__(self, model: FakeModel, batch: Sequence[Scheduled], before: FakeStep | None) -> None:
        self.model, self.batch, self.before = model, batch, before
        self.work = [
            (list(item.sequence.blocks), item.sequence.tokens[item.start : item.start + item.query_len])
            for item in batch
        ]
        self.tokens: dict[Choice, int] = {}
        self.sampled = False

    def sample(self) -> None:
        assert not self.sampled
        self.sampled = True

    def then(self, batch: Sequence[Scheduled]) -> FakeStep:
        assert self.sampled
        return FakeStep(self.model, batch, self)

    def results(self) -> list[FakeResult]:
        assert self.sampled
        if self.model.failing:
            self.model.failing -= 1
            raise RuntimeError("device lost")
        memory, results = self.model.memory, []
        for item, (blocks, known) in zip(self.batch, self.work, strict=True):
            if len(known) < item.query_len:
                assert self.before is not None
                known.append(self.before.tokens[item.sequence])
            for position, token in enumerate(known, item.start):
                memory[blocks[position // BLOCK]][position % BLOCK] = token
            end = item.start + item.query_len
            context = [memory[blocks[p // BLOCK]][p % BLOCK] for p in range(end)]
            if item.samples:
                self.tokens[item.sequence] = next_token(context)
            results.append(FakeResult(Sampled(next_token(context), None) if item.samples else None))
        return results


class Collector:
    """Gathers outputs and lets a test wait for the end of every choice."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, FinishReason | None] = {}
        self.errors: dict[int, str] = {}
        self.ready: dict[int, list[int]] = {}
        self.death: BaseException | None = None
        self.changed = threading.Condition()

    def outputs(self, outputs: list[Output]) -> None:
        with self.changed:
            for output in outputs:
                key = output.choice.key
                if output.ready is not None:
                    known = self.ready.setdefault(key, [])
                    assert output.ready.first_index == len(known)
                    known += output.ready.blocks
                if output.sampled is not None:
                    self.tokens.setdefault(key, []).append(output.sampled.token_id)
                if output.error:
                    self.errors[key] = output.error
                if output.finish_reason is not None or output.error:
                    self.finished[key] = output.finish_reason
            self.changed.notify_all()

    def index_changed(self, events: list[Event]) -> None: ...

    def died(self, error: BaseException) -> None:
        with self.changed:
            self.death = error
            self.changed.notify_all()

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.death or condition(), timeout=30)
            assert self.death is None


def choice(key: int, prompt: list[int], max_tokens: int, work: Work = Work.GENERATE, **sampling) -> Choice:
    return Choice(
        key=key,
        request_id=str(key),
        tokens=list(prompt),
        prompt_len=len(prompt),
        sampling=Sampling(max_tokens=max_tokens, **sampling),
        root=bytes(16),
        block_size=BLOCK,
        work=work,
    )


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    context = list(prompt)
    for _ in range(max_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


class Running:
    """An engine over a fake model, stopped at the end of the block."""

    def __init__(
        self,
        blocks: int = 32,
        limits: Limits = LIMITS,
        eos: frozenset[int] = frozenset(),
        overlap: bool = False,
        longest: int = 10_000,
    ) -> None:
        self.pool = BlockPool(blocks)
        self.model = FakeModel(blocks)
        self.collector = Collector()
        scheduler = Scheduler(self.pool, limits)
        self.engine = Engine(scheduler, self.model, self.collector, Stop(eos, longest), overlap=overlap)

    def __enter__(self) -> Running:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=30)
