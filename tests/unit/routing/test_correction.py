"""What is learnt from prefills that took longer or shorter than their worker's curve says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.routing import Curve, Role, WorkerView
from baton.routing.correction import Correction

VIEW = WorkerView("w0", "1", "w0:1", Role.PREFILL, 64, 64, prefill_curve=Curve(((16.0, 0.1), (64.0, 0.4))))


def test_a_worker_of_which_nothing_was_learnt_is_left_as_measured() -> None:
    assert Correction().apply(VIEW) is VIEW


def test_a_worker_that_is_always_twice_as_slow_is_predicted_so() -> None:
    correction = Correction()
    for _ in range(60):
        correction.learn("w0", 0.1, 0.2)
    assert correction.apply(VIEW).prefill_curve.seconds(32) == pytest.approx(
        2 * VIEW.prefill_curve.seconds(32), rel=0.01
    )
    assert correction.factor("w1") == 1.0


def test_too_slow_and_too_fast_by_as_much_cancel_out() -> None:
    correction = Correction()
    for _ in range(100):
        correction.learn("w0", 0.1, 0.4)
        correction.learn("w0", 0.4, 0.1)
    assert correction.factor("w0") == pytest.approx(1.0, abs=0.1)


def test_a_worker_that_went_is_forgotten() -> None:
    correction = Correction()
    correction.learn("w0", 0.1, 0.2)
    correction.forget("w0")
    assert correction.apply(VIEW) is VIEW


seconds = st.floats(0, 1e9)


@given(st.lists(st.tuples(seconds, seconds), max_size=200))
def test_no_history_makes_a_factor_unusable(history: list[tuple[float, float]]) -> None:
    correction = Correction()
    for predicted_s, actual_s in history:
        correction.learn("w0", predicted_s, actual_s)
    assert 0.124 <= correction.factor("w0") <= 8.001
