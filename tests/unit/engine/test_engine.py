"""The engine finishes every request with the right tokens and gives every block back, under any load.

A fake runner stands for the model: the next token is a function of the whole context, so a wrong
block, a lost token or a bad resume shows as a wrong token.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.engine import Engine, Stop
from baton.engine.interfaces import Output
from baton.engine.reservations import Reservation
from baton.engine.sampler import Sampled
from baton.engine.scheduler import Limits, Scheduled, Scheduler
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import Work
from baton.errors import Overloaded, PoolTooSmall
from baton.kv.events import Event
from baton.kv.lower import LowerTiers
from baton.kv.pool import BlockPool
from baton.sampling import FinishReason, Sampling

BLOCK = 4
VOCAB = 50
LIMITS = Limits(max_batch_tokens=16, max_batch_requests=8, max_waiting=100)

pytestmark = pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])


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


class Scribbler(Collector):
    """Takes whatever block is free between two steps, writes into it as a handoff would, and finds it
    untouched after the next step."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self.engine, self.memory = running.engine, running.model.memory
        self.reserved: Reservation | None = None

    def outputs(self, outputs: list[Output]) -> None:
        self.let_go()
        reservation = self.engine.pin_prefix([])
        if self.engine.reserve(reservation, 1).done():
            self.memory[reservation.blocks[0]] = [-9] * BLOCK
            self.reserved = reservation
        else:
            self.engine.drop(reservation)
        super().outputs(outputs)

    def let_go(self) -> None:
        if self.reserved is not None:
            assert all(self.memory[block] == [-9] * BLOCK for block in self.reserved.blocks)
            self.engine.drop(self.reserved)
            self.reserved = None


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(13, 40),
    st.integers(1, 4),
)
def test_every_request_gets_its_tokens_whatever_is_preempted(overlap, requests, blocks, batch) -> None:
    with Running(blocks, Limits(16, batch, 100), overlap=overlap) as running:
        for key, (prompt, max_tokens) in enumerate(requests):
            running.engine.submit(choice(key, prompt, max_tokens))
        running.collector.wait(lambda: len(running.collector.finished) == len(requests))
        for key, (prompt, max_tokens) in enumerate(requests):
            assert running.collector.tokens[key] == expected(prompt, max_tokens)
        assert running.pool.pinned == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=10),
    st.integers(14, 24),
    st.integers(1, 4),
)
def test_no_block_is_given_away_while_a_step_uses_it(overlap, requests, blocks, batch) -> None:
    with Running(blocks, Limits(16, batch, 100), overlap=overlap) as running:
        collector = running.engine.observer = Scribbler(running)
        choices = []
        for key, (prompt, max_tokens, cancelled) in enumerate(requests):
            tokens = expected(prompt, max_tokens)
            # Some stop before they must: the step after has begun by then.
            choices.append(choice(key, prompt, max_tokens, stop_token_ids=tuple(tokens[5 + cancelled :])))
            running.engine.submit(choices[-1])
        for one, (_, _, cancelled) in zip(choices, requests, strict=True):
            if cancelled == 0:
                running.engine.cancel(one)
        kept = [key for key, (_, _, cancelled) in enumerate(requests) if cancelled]
        collector.wait(lambda: all(key in collector.finished for key in kept))
        for key in kept:
            wanted = expected(*requests[key][:2])
            stops = set(choices[key].sampling.stop_token_ids)
            end = next((at for at, token in enumerate(wanted, 1) if token in stops), len(wanted))
            assert collector.tokens[key] == wanted[:end]
    collector.let_go()
    assert running.pool.pinned == 0


def test_preemption_happens_and_costs_no_token(overlap) -> None:
    with Running(blocks=12, limits=Limits(64, 8, 100), overlap=overlap) as running:
        for key in range(4):
            running.engine.submit(choice(key, [key] * 8, 16))
        running.collector.wait(lambda: len(running.collector.finished) == 4)
        assert running.engine.scheduler.preemptions > 0
        assert all(running.collector.tokens[key] == expected([key] * 8, 16) for key in range(4))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(prompts, st.integers(1, 30), st.booleans()), min_size=1, max_size=10))
def test_cancelled_requests_leave_nothing_behind(overlap, requests) -> None:
    with Running(blocks=24, overlap=overlap) as running:
        choices = [choice(key, prompt, max_tokens) for key, (prompt, max_tokens, _) in enumerate(requests)]
        for one in choices:
            running.engine.submit(one)
        for one, (_, _, cancelled) in zip(choices, requests, strict=True):
            if cancelled:
                running.engine.cancel(one)
        kept = [key for key, (_, _, cancelled) in enumerate(requests) if not cancelled]
        running.collector.wait(lambda: all(key in running.collector.finished for key in kept))
        for key in kept:
            assert running.collector.tokens[key] == expected(requests[key][0], requests[key][1])
    assert running.pool.pinned == 0


def test_prefill_work_announces_each_block_once_and_pins_until_released(overlap) -> None:
    with Running(blocks=32, limits=Limits(8, 8, 100), overlap=overlap) as running:
        prompt = [n % 7 for n in range(30)]
        one = choice(0, prompt, 5, Work.PREFILL)
        running.engine.submit(one)
        running.collector.wait(lambda: len(running.collector.ready.get(0, [])) == 8)
        blocks = running.collector.ready[0]
        assert running.collector.tokens[0] == expected(prompt, 1)
        assert [running.model.memory[b // 1][i] for b in blocks for i in range(BLOCK)][:30] == prompt
        assert running.pool.pinned == 8
        running.engine.cancel(one)
        assert running.pool.pinned == 0


def test_prefill_that_ends_with_its_first_token_announces_nothing(overlap) -> None:
    with Running(overlap=overlap) as running:
        one = choice(0, [1] * 9, 1, Work.PREFILL)
        running.engine.submit(one)
        running.collector.wait(lambda: 0 in running.collector.finished)
        assert running.collector.ready == {}
        running.engine.cancel(one)
        assert running.pool.pinned == 0


def test_a_handed_over_request_goes_on_where_prefill_ended(overlap) -> None:
    with Running(overlap=overlap) as source, Running(overlap=overlap) as target:
        prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
        lent = choice(0, prompt, 12, Work.PREFILL)
        source.engine.submit(lent)
        source.collector.wait(lambda: len(source.collector.ready.get(0, [])) == 3)

        taken = choice(0, prompt, 12)
        reservation = target.engine.pin_prefix(taken.chain(2))
        target.engine.reserve(reservation, 3).result(timeout=10)
        for theirs, ours in zip(source.collector.ready[0], reservation.blocks, strict=True):
            target.model.memory[ours] = list(source.model.memory[theirs])
        taken.append(source.collector.tokens[0][0])
        taken.started = True
        source.engine.cancel(lent)
        target.engine.adopt(reservation, taken)
        target.collector.wait(lambda: 0 in target.collector.finished)
        assert source.collector.tokens[0] + target.collector.tokens[0] == expected(prompt, 12)
        assert source.pool.pinned == target.pool.pinned == 0


def test_reservations_are_served_in_order_as_blocks_come_free(overlap) -> None:
    with Running(blocks=8, overlap=overlap) as running:
        first = running.engine.pin_prefix([])
        second = running.engine.pin_prefix([])
        running.engine.reserve(first, 6).result(timeout=10)
        waiting = running.engine.reserve(second, 6)
        assert not waiting.done()
        running.engine.drop(first)
        waiting.result(timeout=10)
        running.engine.drop(second)
        assert running.pool.pinned == 0


def test_end_of_sequence_and_stop_tokens(overlap) -> None:
    prompt = [1, 2, 3]
    tokens = expected(prompt, 6)
    with Running(eos=frozenset({tokens[3]}), overlap=overlap) as running:
        running.engine.submit(choice(0, prompt, 50))
        running.engine.submit(choice(1, prompt, 50, stop_token_ids=(tokens[1],)))
        running.engine.submit(choice(2, prompt, 6, ignore_eos=True))
        running.collector.wait(lambda: len(running.collector.finished) == 3)
        at = tokens.index(tokens[3])
        assert running.collector.tokens[0] == tokens[: at + 1]
        assert running.collector.tokens[1] == tokens[: tokens.index(tokens[1]) + 1]
        assert running.collector.tokens[2] == tokens
        assert running.collector.finished == {
            0: FinishReason.STOP,
            1: FinishReason.STOP,
            2: FinishReason.LENGTH,
        }


def test_a_failing_step_ends_its_requests_and_no_others(overlap) -> None:
    with Running(overlap=overlap) as running:
        running.model.failing = 1
        running.engine.submit(choice(0, [1, 2], 4))
        running.collector.wait(lambda: 0 in running.collector.errors)
        assert "device lost" in running.collector.errors[0]
        running.engine.submit(choice(1, [1, 2], 4))
        running.collector.wait(lambda: 1 in running.collector.finished)
        assert running.collector.tokens[1] == expected([1, 2], 4)
        assert running.pool.pinned == 0


def test_what_can_never_fit_and_what_does_not_fit_the_queue_is_refused(overlap) -> None:
    with Running(blocks=8, limits=Limits(16, 8, 1), overlap=overlap) as running:
        with pytest.raises(PoolTooSmall, match="needs 10 KV blocks of 4 tokens and the worker has 8"):
            running.engine.submit(choice(0, [1] * 20, 20))
        blocked = running.engine.pin_prefix([])
        running.engine.reserve(blocked, 8).result(timeout=10)
        running.engine.submit(choice(1, [1] * 8, 4))
        with pytest.raises(Overloaded):
            running.engine.submit(choice(2, [1] * 8, 4))
        running.engine.drop(blocked)
        running.collector.wait(lambda: 1 in running.collector.finished)


class ShelfTiers:
    """A host tier of the fake model's memory whose jobs run on a thread of their own."""

    def __init__(self, model: FakeModel, slots: int, failing: float) -> None:
        self.model = model
        self.failing = failing
        self.slots = [[-1] * BLOCK for _ in range(slots)]
        self.threads = ThreadPoolExecutor(1)

    def copy_down(self, block: int, host_slot: int) -> None:
        self.slots[host_slot] = list(self.model.memory[block])

    def settle(self) -> None: ...

    def fetch(self, held, blocks, done) -> None:
        self.threads.submit(self._fetch, [one.slot for one in held], blocks, done)

    def _fetch(self, slots, blocks, done) -> None:
        reasons = ["" if random.random() >= self.failing else "checksum" for _ in slots]
        for slot, block, reason in zip(slots, blocks, reasons, strict=True):
            self.model.memory[block] = [-7] * BLOCK if reason else list(self.slots[slot])
        done(reasons)

    def spill(self, spills, done) -> None:
        raise AssertionError("there is no disk")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 12), st.booleans()), min_size=1, max_size=25),
    st.integers(11, 24),
    st.integers(1, 40),
)
def test_tokens_are_right_whatever_goes_down_and_fails_to_come_back(overlap, requests, blocks, slots) -> None:
    with Running(blocks, Limits(16, 3, 100), overlap=overlap) as running:
        tiers = ShelfTiers(running.model, slots, failing=0.1)
        running.pool.put_below(LowerTiers(slots, 0, tiers))
        running.engine.mover = tiers
        choices = [choice(key, prompt, tokens) for key, (prompt, tokens, _) in enumerate(requests)]
        for one, (_, _, cancelled) in zip(choices, requests, strict=True):
            running.engine.submit(one)
            if cancelled:
                running.engine.cancel(one)
        kept = [key for key, (_, _, cancelled) in enumerate(requests) if not cancelled]
        running.collector.wait(lambda: all(key in running.collector.finished for key in kept))
        tiers.threads.shutdown()
        for key in kept:
            assert running.collector.tokens[key] == expected(requests[key][0], requests[key][1])
    assert running.pool.pinned == 0


def test_pinning_brings_up_what_lies_below(overlap) -> None:
    with Running(blocks=8, overlap=overlap) as running:
        tiers = ShelfTiers(running.model, 20, failing=0)
        running.pool.put_below(LowerTiers(20, 0, tiers))
        running.engine.mover = tiers
        first = choice(0, [1] * 20, 1)
        for one in (first, choice(1, [2] * 28, 1)):
            running.engine.submit(one)
            running.collector.wait(lambda key=one.key: key in running.collector.finished)
        chain = first.chain(5)
        assert running.pool.match(chain) + running.pool.match_below(chain, running.pool.match(chain)) == 5
        pinned = running.engine.pin_all(chain).result(timeout=10)
        assert len(pinned.blocks) == pinned.held > 0
        assert all(running.model.memory[block] == [1] * BLOCK for block in pinned.blocks)
        running.engine.unpin(pinned)
        tiers.threads.shutdown()
    assert running.pool.pinned == 0


def test_a_request_whose_handoff_is_under_way_is_part_of_the_load(overlap) -> None:
    with Running(blocks=8, overlap=overlap) as running:
        reservation = running.engine.pin_prefix([])
        assert running.engine.load().reading == 1
        running.engine.drop(reservation)
        assert running.engine.load().reading == 0
