"""A request is placed a few times, each time away from where it failed."""

from __future__ import annotations

from baton.routing.attempts import BREAKS_S, FIRST_WAIT_S, NOBODY, Attempts


def test_a_first_placement_avoids_nobody_and_waits_a_little() -> None:
    attempts = Attempts(2, 0.0)
    assert (attempts.avoiding, attempts.wait_s) == ((NOBODY,), FIRST_WAIT_S)


def test_a_replacement_waits_and_keeps_away_from_all_that_failed_as_long_as_it_can() -> None:
    attempts = Attempts(4, 0.0)
    assert attempts.failed("a", 0, 1.0)
    assert attempts.failed("b", 0, 1.0)
    assert attempts.avoiding == (frozenset({"a", "b"}), NOBODY)
    assert attempts.wait_s > FIRST_WAIT_S


def test_nobody_is_avoided_where_nobody_is_at_fault() -> None:
    attempts = Attempts(2, 0.0)
    assert attempts.failed(None, 7, 1.0)
    assert attempts.avoiding == (NOBODY,)
    assert attempts.wait_s > FIRST_WAIT_S


def test_as_many_in_a_row_may_bring_nothing_as_were_allowed() -> None:
    attempts = Attempts(3, 0.0)
    assert all(attempts.failed("a", tokens, 1.0) for tokens in (0, 0, 5, 0))
    assert not attempts.failed("a", 0, 1.0)


def test_connections_may_break_as_often_as_they_like_for_a_while() -> None:
    attempts = Attempts(1, 0.0)
    assert all(attempts.failed("a", 0, BREAKS_S, broke=True) for _ in range(9))
    assert attempts.failed("a", 3, BREAKS_S + 1, broke=True)
    assert attempts.failed("a", 0, 2 * BREAKS_S, broke=True), "it went on meanwhile"
    assert not attempts.failed("a", 0, 2 * BREAKS_S + 2, broke=True)


def test_whatever_else_fails_counts_at_once() -> None:
    attempts = Attempts(1, 0.0)
    assert not attempts.failed("a", 0, 1.0)
