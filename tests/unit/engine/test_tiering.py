"""What goes down to host memory comes up again as it was, or is computed again."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.scheduler import Limits
from baton.kv.lower import LowerTiers
from tests.unit.engine.fake_engine import BLOCK, FakeModel, Running, choice, expected, prompts

pytestmark = pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])


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


@settings(max_examples=30)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 12), st.booleans()), min_size=1, max_size=25),
    st.integers(11, 24),
    st.integers(1, 40),
)
def test_tokens_are_right_whatever_goes_down_and_fails_to_come_back(overlap, requests, blocks, slots) -> None:
    with Running(blocks, Limits(16, 3, 100), overlap=overlap) as running:
        tiers = ShelfTiers(running.model, slots, failing=0.1)
        running.pool.put_below(LowerTiers(slots, 0, tiers))
        running.engine.tiering.mover = tiers
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
        running.engine.tiering.mover = tiers
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
