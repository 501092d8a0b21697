"""Does the token budget found at start-up stop where prefill stops getting faster?"""

from __future__ import annotations

import pytest

from baton.engine.curves import knee


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
