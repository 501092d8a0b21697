"""Does a step with an ITL target hold as much as the curves say it may, and does everybody get on?"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.scheduler import Limits, Scheduled, Scheduler
from baton.engine.sequence import Sequence, Work
from baton.kv.pool import BlockPool
from baton.routing.pacing import LEAST_PROMPT_TOKENS, Pace
from baton.routing.view import Curve
from baton.sampling import Sampling

BLOCK = 4
#: 10 ms to read the weights, then 1 ms per prompt token and 2 ms per request.
PREFILL = Curve(((16, 0.026), (256, 0.266)))
DECODE = Curve(((1, 0.012), (64, 0.138)))


def pace(itl_target_s: float) -> Pace:
    return Pace(itl_target_s, PREFILL, DECODE)


def sequence(key: int, prompt: int, output: int = 4) -> Sequence:
    return Sequence(
        key=key,
        request_id=str(key),
        tokens=[random.Random(key).randrange(1000) for _ in range(prompt)],
        prompt_len=prompt,
        sampling=Sampling(max_tokens=output, temperature=0.0),
        root=key.to_bytes(16, "little"),
        block_size=BLOCK,
        work=Work.GENERATE,
    )


def finish_step(scheduler: Scheduler, batch: list[Scheduled]) -> None:
    """Compute `batch`: a token for all who sample, and the end of those who have enough."""
    for item in batch:
        scheduler.advance(item)
        if item.samples:
            item.sequence.append(7)
            if item.sequence.output_len == item.sequence.sampling.max_tokens:
                scheduler.release(item.sequence)


def test_without_a_target_nothing_is_bounded() -> None:
    assert pace(0.0).prompt_tokens(decoding=64, most=8192) == 8192
    assert pace(0.0).decoding(most=64) == 64


def test_without_decoding_requests_there_is_nobody_to_wait_too_long() -> None:
    assert pace(0.001).prompt_tokens(decoding=0, most=8192) == 8192


def test_the_weights_are_read_once_for_prompts_and_decoding_requests() -> None:
    assert pace(1.0).step_s(decoding=8, prompt_tokens=100) == pytest.approx(0.026 + 0.110 - 0.012)


@given(target_s=st.floats(0.02, 1.0), decoding=st.integers(1, 64), most=st.integers(16, 4096))
def test_the_prompt_tokens_are_as_many_as_meet_the_target(target_s: float, decoding: int, most: int) -> None:
    chosen = pace(target_s)
    tokens = chosen.prompt_tokens(decoding, most)
    assert min(most, LEAST_PROMPT_TOKENS) <= tokens <= most
    if tokens > LEAST_PROMPT_TOKENS:
        assert chosen.step_s(decoding, tokens) <= target_s
    if tokens < most:
        assert chosen.step_s(decoding, tokens + 1) > target_s


@given(target_s=st.floats(0.05, 1.0), slower=st.floats(0.5, 4.0), decoding=st.integers(1, 64))
def test_steps_that_take_longer_than_predicted_come_to_hold_less(
    target_s: float, slower: float, decoding: int
) -> None:
    learning = pace(target_s)
    for _ in range(300):
        tokens = learning.prompt_tokens(decoding, 4096)
        learning = learning.learnt(decoding, tokens, slower * pace(target_s).step_s(decoding, tokens))
    assert learning.step_s(decoding, 500) == pytest.approx(slower * pace(target_s).step_s(decoding, 500))
    if LEAST_PROMPT_TOKENS < tokens < 4096:
        assert slower * pace(target_s).step_s(decoding, tokens) == pytest.approx(target_s, rel=0.05)


@given(took_s=st.floats(0.001, 1.0), decoding=st.integers(1, 64), steps=st.integers(1, 200))
def test_many_steps_at_once_teach_what_they_teach_one_by_one(
    took_s: float, decoding: int, steps: int
) -> None:
    one_by_one = pace(0.1)
    for _ in range(steps):
        one_by_one = one_by_one.learnt(decoding, 0, took_s)
    assert pace(0.1).learnt(decoding, 0, took_s, steps).factor == pytest.approx(one_by_one.factor)


def test_one_stalled_step_changes_little_and_one_in_which_nobody_decodes_nothing() -> None:
    stalled = pace(0.1).learnt(4, 50, 60.0)
    assert 1.0 < stalled.step_s(4, 50) / pace(0.1).step_s(4, 50) < 1.12
    assert stalled.learnt(0, 50, 60.0) is stalled


@given(target_s=st.floats(0.001, 1.0), most=st.integers(1, 64))
def test_as_many_decode_as_meet_the_target_and_at_least_one(target_s: float, most: int) -> None:
    count = pace(target_s).decoding(most)
    assert 1 <= count <= most
    assert count == 1 or DECODE.seconds(count) <= target_s
    assert count == most or DECODE.seconds(count + 1) > target_s


@given(
    prompts=st.lists(st.integers(1, 120), min_size=1, max_size=12),
    target_s=st.sampled_from([0.0, 0.001, 0.02, 0.05, 0.1]),
    adopted=st.integers(0, 6),
    blocks=st.integers(40, 120),
)
def test_every_prompt_progresses_and_every_request_ends(
    prompts: list[int], target_s: float, adopted: int, blocks: int
) -> None:
    chosen = pace(target_s)
    scheduler = Scheduler(BlockPool(blocks), Limits(64, 8, 100), chosen)
    for key, prompt in enumerate(prompts):
        scheduler.submit(sequence(key, prompt))
    for key in range(100, 100 + adopted):
        read = sequence(key, 9)
        read.append(7)
        scheduler.adopt(read, scheduler.pool.allocate(3), 0)
    for _ in range(2000):
        head = next((each for each in scheduler.running if each.remaining > 1), None)
        before = head.remaining if head is not None else 0
        running = set(scheduler.running)
        batch = scheduler.schedule()
        if not batch:
            break
        # One token to go: a decoding request, or a prompt's last; these go first.
        single = [item for item in batch if item.sequence in running and item.samples and item.query_len == 1]
        assert sum(item.sequence.output_len > 0 for item in single) <= chosen.decoding(8)
        prompt_tokens = sum(item.query_len for item in batch if item not in single)
        if target_s and single and prompt_tokens > LEAST_PROMPT_TOKENS:
            assert chosen.step_s(len(single), prompt_tokens) <= target_s
        finish_step(scheduler, batch)
        if head is not None and head in scheduler.running:
            assert head.remaining < before
    assert not list(scheduler.running) and not scheduler.waiting
    assert scheduler.pool.available == blocks


def test_who_is_read_here_beyond_the_target_begins_when_another_ends() -> None:
    scheduler = Scheduler(BlockPool(100), Limits(64, 8, 100), pace(0.0145))
    requests = [sequence(key, 5, output=3) for key in range(4)]
    for request in requests:
        request.append(7)
        scheduler.adopt(request, scheduler.pool.allocate(2), 0)
    seen: list[list[int]] = []
    while batch := scheduler.schedule():
        seen.append([item.sequence.key for item in batch])
        finish_step(scheduler, batch)
    assert seen == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("target_s", "decoding", "taken_s"),
    [
        (0.05, 1, 64 / 40 * 0.05),  # 40 tokens and one request in each step
        (0.05, 6, 64 / 30 * 0.05),
        (0.5, 1, 0.074),  # one step
        (0.02, 1, None),
        (0.0, 1, None),
    ],
)
def test_a_prompt_takes_as_many_steps_as_the_target_asks(
    target_s: float, decoding: int, taken_s: float | None
) -> None:
    assert pace(target_s).paced_s(decoding, 64) == (taken_s and pytest.approx(taken_s))
