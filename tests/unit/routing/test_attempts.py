"""A request is placed a few times, each time away from where it failed."""

from __future__ import annotations

from baton.routing.attempts import FIRST_WAIT_S, NOBODY, Attempts


def test_a_first_placement_avoids_nobody_and_waits_a_little() -> None:
    attempts = Attempts(2)
    assert (attempts.avoiding, attempts.wait_s) == ((NOBODY,), FIRST_WAIT_S)


def test_a_replacement_waits_and_keeps_away_from_all_that_failed_as_long_as_it_can() -> None:
    attempts = Attempts(4)
    assert attempts.failed("a", 0)
    assert attempts.failed("b", 0)
    assert attempts.avoiding == (frozenset({"a", "b"}), NOBODY)
    assert attempts.wait_s > FIRST_WAIT_S


def test_nobody_is_avoided_where_nobody_is_at_fault() -> None:
    attempts = Attempts(2)
    assert attempts.failed(None, 7)
    assert attempts.avoiding == (NOBODY,)
    assert attempts.wait_s > FIRST_WAIT_S


def test_as_many_in_a_row_may_bring_nothing_as_were_allowed() -> None:
    attempts = Attempts(3)
    assert [attempts.failed("a", tokens) for tokens in (0, 0, 5, 0, 0)] == [True, True, True, True, False]


def test_what_does_not_count_may_happen_as_often_as_it_likes() -> None:
    attempts = Attempts(1)
    assert all(attempts.failed("a", 0, counts=False) for _ in range(9))
    assert not attempts.failed("a", 0)
