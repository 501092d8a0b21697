"""The engine finishes every request with the right tokens and gives every block back, under any load."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.interfaces import Output
from baton.engine.reservations import Reservation
from baton.engine.scheduler import Limits
from baton.engine.sequence import Work
from baton.errors import Overloaded, PoolTooSmall
from baton.sampling import FinishReason
from tests.unit.engine.fake_engine import BLOCK, Collector, Running, choice, expected, prompts

pytestmark = pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])


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


@settings(max_examples=40)
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


@settings(max_examples=60)
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


@settings(max_examples=20)
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
        target.engine.reserve(reservation, 3).result(timeout=60)
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
        running.engine.reserve(first, 6).result(timeout=60)
        waiting = running.engine.reserve(second, 6)
        assert not waiting.done()
        running.engine.drop(first)
        waiting.result(timeout=60)
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


class CountingGuide:
    """Allows everything, until the answer is complete with so many tokens, or can be followed no more."""

    failure = ""

    def __init__(self, most: int, failure: str = "") -> None:
        self._most, self._failure = most, failure

    def complete(self, tokens: Sequence[int]) -> bool:
        if len(tokens) >= self._most:
            self.failure = self._failure
        return len(tokens) >= self._most and not self.failure

    def fill(self, tokens: Sequence[int], address: int, size: int) -> None: ...


def test_a_guide_ends_its_request_and_no_other(overlap) -> None:
    prompt = [1, 2, 3]
    with Running(overlap=overlap) as running:
        whole, lost, prefilled = (
            choice(0, prompt, 9),
            choice(1, prompt, 9),
            choice(2, prompt, 9, Work.PREFILL),
        )
        whole.guide, lost.guide, prefilled.guide = (
            CountingGuide(7), CountingGuide(5, "too hard"), CountingGuide(4, "too hard")
        )  # fmt: skip
        for one in (whole, lost, prefilled, choice(3, prompt, 9)):
            running.engine.submit(one)
        running.collector.wait(lambda: len(running.collector.finished) == 4)
        assert running.collector.finished == {
            0: FinishReason.STOP,
            1: None,
            2: None,
            3: FinishReason.LENGTH,
        }
        assert running.collector.tokens == {
            0: expected(prompt, 4),
            1: expected(prompt, 1),
            3: expected(prompt, 9),
        }
        assert running.collector.errors == {1: "too hard", 2: "too hard"}
        running.engine.cancel(prefilled)
        assert running.pool.pinned == 0


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
        running.engine.reserve(blocked, 8).result(timeout=60)
        running.engine.submit(choice(1, [1] * 8, 4))
        with pytest.raises(Overloaded):
            running.engine.submit(choice(2, [1] * 8, 4))
        running.engine.drop(blocked)
        running.collector.wait(lambda: 1 in running.collector.finished)


def test_a_request_whose_handoff_is_under_way_is_part_of_the_load(overlap) -> None:
    with Running(blocks=8, overlap=overlap) as running:
        reservation = running.engine.pin_prefix([])
        assert running.engine.load().reading == 1
        running.engine.drop(reservation)
        assert running.engine.load().reading == 0
