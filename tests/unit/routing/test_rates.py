"""How fast reads are is learnt from reads: slowly, from large ones, and forgotten with their source."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.routing.rates import ReadRates, notably_differ

MIB = 1024 * 1024


def test_a_rate_moves_a_fifth_of_the_way_to_every_read() -> None:
    rates = ReadRates[str]()
    rates.begin("disk", 100 * MIB)
    rates.note("disk", 10 * MIB, 1.0)
    assert rates.now() == {"disk": pytest.approx(82 * MIB)}


def test_the_first_read_counts_in_full_and_small_ones_not_at_all() -> None:
    rates = ReadRates[str]()
    rates.note("a", MIB - 1, 1.0)
    assert rates.now() == {}
    rates.note("a", 4 * MIB, 2.0)
    rates.note("a", 8, 100.0)
    assert rates.now() == {"a": 2 * MIB}


def test_a_source_that_is_gone_is_forgotten() -> None:
    rates = ReadRates[str]()
    rates.note("a", MIB, 1.0)
    rates.forget("a")
    rates.forget("never seen")
    assert rates.now() == {}


@given(st.lists(st.tuples(st.integers(MIB, 100 * MIB), st.floats(1e-3, 10.0)), min_size=1))
def test_a_rate_stays_within_what_was_seen(reads: list[tuple[int, float]]) -> None:
    rates = ReadRates[str]()
    for read_bytes, seconds in reads:
        rates.note("a", read_bytes, seconds)
    seen = [read_bytes / seconds for read_bytes, seconds in reads]
    assert min(seen) * 0.999 <= rates.now()["a"] <= max(seen) * 1.001


@pytest.mark.parametrize(
    ("now", "expected"), [({"a": 1.05}, False), ({"a": 1.2}, True), ({"a": 0.8}, True), ({}, True)]
)
def test_rates_that_moved_by_more_than_a_tenth_are_worth_telling(
    now: dict[str, float], expected: bool
) -> None:
    assert notably_differ({"a": 1.0}, now) is expected
