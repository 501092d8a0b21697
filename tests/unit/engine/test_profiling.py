"""What is measured are steps of the engine as it runs: whole batches, nothing cached, nothing left behind."""

from __future__ import annotations

from collections import Counter

import pytest

from baton.engine.engine import Engine, Stop
from baton.engine.profiling import Profiler, StepClock
from baton.engine.scheduler import Limits, Scheduler
from baton.errors import BatonError
from baton.kv.pool import BlockPool
from tests.unit.engine.fake_engine import BLOCK, FakeModel, FakeStep

BLOCKS = 200


class Counting(FakeModel):
    """Notes how many sequences decode in each step, and how many tokens of prompts there are."""

    def __init__(self) -> None:
        super().__init__(BLOCKS)
        self.steps: Counter[tuple[int, int]] = Counter()

    def begin(self, batch) -> FakeStep:
        prompts = sum(item.query_len for item in batch if not item.sequence.output_len)
        self.steps[sum(bool(item.sequence.output_len) for item in batch), prompts] += 1
        return super().begin(batch)


@pytest.fixture
def model() -> Counting:
    return Counting()


@pytest.fixture
def profiler(model: Counting):
    clock = StepClock()
    scheduler = Scheduler(BlockPool(BLOCKS), Limits(16, 8, 100))
    engine = Engine(scheduler, model, clock, Stop(frozenset(), 1000))
    engine.start()
    yield Profiler(engine, clock, BLOCK, vocabulary=50)
    engine.stop()
    assert scheduler.pool.pinned == 0


def test_prompts_are_computed_alone_whole_and_again(profiler: Profiler, model: Counting) -> None:
    curve = profiler.prefill([4, 16, 40], budget_s=60.0)
    assert list(curve) == [4, 16, 40]
    assert min(curve.values()) > 0
    # 40 tokens take three steps of 16 at most.
    assert set(model.steps) == {(0, 4), (0, 16), (0, 8)}
    assert model.steps[0, 4] >= 3
    assert model.steps[0, 8] >= 3


def test_batches_decode_together_for_many_steps(profiler: Profiler, model: Counting) -> None:
    assert list(profiler.decode([1, 2, 4], context=24, budget_s=60.0)) == [1, 2, 4]
    assert all(model.steps[batch, 0] >= 16 for batch in (1, 2, 4))


def test_batches_that_the_pool_cannot_hold_are_left_out(profiler: Profiler) -> None:
    assert list(profiler.decode([1, 2, 8], context=400, budget_s=60.0)) == [1]


def test_an_engine_that_fails_says_so(profiler: Profiler, model: Counting) -> None:
    model.failing = 1
    with pytest.raises(BatonError, match="1 sequences"):
        profiler.prefill([4], budget_s=60.0)
