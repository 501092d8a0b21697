"""How long requests keep away from a worker whose placements break."""

from __future__ import annotations

import time

import pytest

from services.router.suspects import Suspects


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


def backoff_s(suspects: Suspects, clock: Clock) -> float:
    """Let a placement break and wait until the worker is tried again."""
    assert suspects.broke("w")
    began_s = clock.now_s
    while "w" in suspects.avoided():
        assert not suspects.broke("w"), "breaks during a back-off must not prolong it"
        clock.now_s += 0.25
    return clock.now_s - began_s


def test_a_back_off_doubles_up_to_a_bound_and_ends_with_success(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, suspects = Clock(monkeypatch), Suspects()
    assert [backoff_s(suspects, clock) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    suspects.worked("w")
    assert backoff_s(suspects, clock) == 1


def test_only_the_worker_that_broke_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    suspects = Suspects()
    suspects.broke("w")
    suspects.broke("x")
    suspects.worked("w")
    assert suspects.avoided() == {"x"}
