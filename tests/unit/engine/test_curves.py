"""Does the token budget found at start-up stop where prefill stops getting faster?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from baton.engine import curves
from baton.engine.curves import measure_prefill
from baton.engine.runner import Runner
from baton.engine.scheduler import Scheduled
from baton.engine.step_size import knee
from baton.kv.pool import BlockPool


class Clock:
    """Time, and a runner whose steps take `overhead_s` and a second per `tokens_per_s` tokens of it."""

    def __init__(self, overhead_s: float, tokens_per_s: float) -> None:
        self.now = 0.0
        self._overhead_s, self._tokens_per_s = overhead_s, tokens_per_s

    def perf_counter(self) -> float:
        return self.now

    def run(self, batch: Sequence[Scheduled]) -> None:
        self.now += self._overhead_s + sum(item.query_len for item in batch) / self._tokens_per_s


def measured(clock: Clock, monkeypatch: pytest.MonkeyPatch, blocks: int = 1000) -> dict[int, float]:
    monkeypatch.setattr(curves, "time", clock)
    sizes = (16, 32, 64, 128, 256, 512, 1024)
    pool = BlockPool(blocks)
    curve = measure_prefill(cast(Runner, clock), pool, 16, sizes, budget_s=0.6)
    assert pool.available == blocks
    return curve


def overhead_then_linear(overhead_s: float, tokens_per_s: float) -> dict[int, float]:
    sizes = (16, 64, 128, 256, 512, 1024, 2048)
    return {size: overhead_s + size / tokens_per_s for size in sizes}


def test_a_machine_at_its_limit_from_the_start_takes_the_smallest_step() -> None:
    assert knee(overhead_then_linear(0.0, 1000.0)) == 16


@pytest.mark.parametrize(("overhead_s", "expected"), [(0.001, 64), (0.01, 256), (0.02, 512), (0.1, 1024)])
def test_the_more_a_step_costs_the_larger_it_must_be(overhead_s: float, expected: int) -> None:
    assert knee(overhead_then_linear(overhead_s, 1000.0)) == expected


def test_a_curve_that_bends_back_stops_before_it_does() -> None:
    assert knee({64: 0.1, 256: 0.2, 1024: 0.8, 2048: 3.0}) == 256


def test_a_fast_machine_measures_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = measured(Clock(0.001, 100_000.0), monkeypatch)
    assert curve == pytest.approx({size: 0.001 + size / 1e5 for size in (16, 32, 64, 128, 256, 512, 1024)})


def test_a_slow_machine_stops_when_the_start_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.01, 900.0)
    assert list(measured(clock, monkeypatch)) == [16, 32, 64, 128]
    assert clock.now < 0.6


def test_the_slowest_machine_still_measures_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(measured(Clock(1.0, 10.0), monkeypatch)) == [16, 32]


def test_a_pool_too_small_for_a_size_ends_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(measured(Clock(0.0, 1e6), monkeypatch, blocks=5)) == [16, 32, 64]
