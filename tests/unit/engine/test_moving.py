"""A sequence that another engine takes over goes on with the very next token, and every block comes back."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.interfaces import Output
from baton.engine.reservations import Pinned, Reservation
from baton.engine.scheduler import Limits
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import longest_reusable
from tests.unit.engine.fake_engine import Collector, Running, choice, expected

LIMITS = Limits(max_batch_tokens=64, max_batch_requests=16, max_waiting=100)
_STEP_S = 0.0005

pytestmark = pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])


class Paced(Collector):
    """Makes steps take as long as a fast device's: the engine waits for what hears its outputs."""

    def outputs(self, outputs: list[Output]) -> None:
        super().outputs(outputs)
        time.sleep(_STEP_S)


class PacedRunning(Running):
    def __init__(self, blocks: int, overlap: bool) -> None:
        super().__init__(blocks, LIMITS, overlap=overlap)
        self.collector = self.engine.observer = Paced()


def begun(running: Running, key: int, tokens: int) -> None:
    """Wait until the choice has so many tokens, or has ended."""
    collector = running.collector
    collector.wait(lambda: len(collector.tokens.get(key, [])) >= tokens or key in collector.finished)


def copy(source: Running, theirs: list[int], target: Running, ours: list[int]) -> None:
    for there, here in zip(theirs, ours, strict=True):
        target.model.memory[here] = list(source.model.memory[there])


def take_over(source: Running, target: Running, one: Choice, prompt: list[int]) -> Choice | None:
    """What the two ends of a move do; None when the choice had ended, or does not decode, before."""
    pinned = source.engine.pin_computed(one)
    if pinned is None:
        return None
    taken = choice(one.key, prompt, one.sampling.max_tokens)
    reservation = target.engine.pin_prefix(taken.chain(longest_reusable(prompt, taken.block_size)))
    try:
        return _take_over(source, target, one, taken, pinned, reservation)
    finally:
        source.engine.thaw(one)
        source.engine.unpin(pinned)


def _take_over(
    source: Running, target: Running, one: Choice, taken: Choice, pinned: Pinned, reservation: Reservation
) -> Choice | None:
    held = reservation.held
    complete = max(held, len(pinned.blocks))
    target.engine.reserve(reservation, complete + 2).result(timeout=60)
    copy(source, pinned.blocks[held:], target, reservation.blocks[held:complete])
    if not source.engine.freeze(one).result(timeout=60):
        target.engine.drop(reservation)
        return None
    for token in one.tokens[one.prompt_len :]:
        taken.append(token)
    taken.started = True
    total = one.blocks_for(len(one.tokens) - 1)
    if total > len(reservation.blocks):
        target.engine.reserve(reservation, total).result(timeout=60)
    copy(source, one.blocks[complete:total], target, reservation.blocks[complete:total])
    source.engine.cancel(one)
    target.engine.adopt(reservation, taken)
    return taken


@settings(max_examples=25)
@given(
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=20), min_size=1, max_size=5),
    after=st.lists(st.integers(1, 100), min_size=5, max_size=5),
)
def test_every_token_comes_once_from_one_engine_or_the_other(overlap, prompts, after) -> None:
    with (
        PacedRunning(blocks=400, overlap=overlap) as source,
        PacedRunning(blocks=400, overlap=overlap) as target,
    ):
        choices = [choice(key, prompt, 120) for key, prompt in enumerate(prompts)]
        for one in choices:
            source.engine.submit(one)
        for one, prompt, tokens in zip(choices, prompts, after, strict=False):
            begun(source, one.key, tokens)
            end = target if take_over(source, target, one, prompt) is not None else source
            end.collector.wait(lambda key=one.key, end=end: key in end.collector.finished)
            first = source.collector.tokens[one.key]
            rest = target.collector.tokens.get(one.key, [])
            assert first + rest == expected(prompt, 120)
        assert source.pool.pinned == target.pool.pinned == 0


def test_what_is_not_taken_goes_on_where_it_was(overlap) -> None:
    with PacedRunning(blocks=64, overlap=overlap) as running:
        one, other = choice(0, [1, 2, 3], 60), choice(1, [4, 5, 6], 60)
        running.engine.submit(one)
        running.engine.submit(other)
        begun(running, 0, 3)
        pinned = running.engine.pin_computed(one)
        assert pinned is not None
        assert running.engine.freeze(one).result(timeout=60)
        begun(running, 1, 60)  # others go on meanwhile
        stood = len(one.tokens)
        running.engine.thaw(one)
        running.engine.unpin(pinned)
        begun(running, 0, 60)
        assert 3 < stood < 60
        assert running.collector.tokens[0] == expected([1, 2, 3], 60)
        assert running.pool.pinned == 0


def test_a_frozen_choice_that_is_cancelled_keeps_its_blocks_until_it_is_thawed(overlap) -> None:
    with PacedRunning(blocks=64, overlap=overlap) as running:
        one = choice(0, [1, 2, 3, 4, 5], 60)
        running.engine.submit(one)
        begun(running, 0, 3)
        assert running.engine.freeze(one).result(timeout=60)
        running.engine.cancel(one)
        assert running.pool.pinned == len(one.blocks) > 0
        running.engine.thaw(one)
        assert running.pool.pinned == 0


def test_a_choice_that_ends_before_it_stops_is_not_frozen(overlap) -> None:
    with PacedRunning(blocks=64, overlap=overlap) as running:
        one = choice(0, [1, 2, 3], 2)
        running.engine.submit(one)
        running.collector.wait(lambda: 0 in running.collector.finished)
        assert not running.engine.freeze(one).result(timeout=60)
        running.engine.thaw(one)
        assert running.pool.pinned == 0


def test_only_what_has_not_begun_to_decode_is_withdrawn(overlap) -> None:
    with PacedRunning(blocks=16, overlap=overlap) as running:
        decoding, waiting = choice(0, [1] * 20, 30), choice(1, [2] * 40, 10)
        running.engine.submit(decoding)
        begun(running, 0, 2)
        running.engine.submit(waiting)  # there is no room for it
        assert not running.engine.withdraw(decoding)
        assert running.engine.withdraw(waiting)
        begun(running, 0, 30)
        assert running.collector.tokens == {0: expected([1] * 20, 30)}


def test_what_nobody_waits_for_any_more_is_not_computed(overlap) -> None:
    with PacedRunning(blocks=1500, overlap=overlap) as running:
        late, soon, never = choice(0, [1] * 9, 40), choice(1, [2] * 9, 5000), choice(2, [3] * 9, 40)
        late.deadline_s = time.monotonic() - 1
        soon.deadline_s = time.monotonic() + 0.2
        for one in (late, soon, never):
            running.engine.submit(one)
        running.collector.wait(lambda: len(running.collector.finished) == 3)
        assert running.collector.errors.keys() == {0, 1}
        assert 0 not in running.collector.tokens
        assert running.collector.tokens[2] == expected([3] * 9, 40)
        running.engine.stop()  # with the step in which the last one was
        assert running.pool.pinned == 0
