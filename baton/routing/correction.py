"""How far each worker's measured prefill curve is off, learnt from what its prefills really took."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

from baton.routing.view import Curve, WorkerView

_WEIGHT = 0.1
_MOST = log(8.0)


class Correction:
    """A factor per worker: the exponentially weighted mean of the log of actual over predicted seconds.

    In logs, twice as fast and twice as slow cancel out. What one prefill says, and so every factor, is
    kept within 1/8 and 8: a stall cannot make a worker unusable for long.
    Bandwidths need none: workers correct theirs themselves, read by read (`baton.routing.rates`).
    """

    def __init__(self) -> None:
        self._log_factors: dict[str, float] = {}
        self._curves: dict[str, tuple[Curve, Curve]] = {}

    def learn(self, worker_id: str, predicted_s: float, actual_s: float) -> None:
        """A prefill that the measured curve, uncorrected, put at `predicted_s` took `actual_s`."""
        if predicted_s <= 0 or actual_s <= 0:
            return
        off = max(-_MOST, min(_MOST, log(actual_s) - log(predicted_s)))
        known = self._log_factors.get(worker_id, 0.0)
        self._log_factors[worker_id] = known + _WEIGHT * (off - known)
        self._curves.pop(worker_id, None)

    def factor(self, worker_id: str) -> float:
        """What the worker's predictions are multiplied by; 1 while nothing was learnt."""
        return exp(self._log_factors.get(worker_id, 0.0))

    def curve(self, worker_id: str, measured: Curve) -> Curve:
        """The prefill curve that the worker measured, as learnt."""
        if worker_id not in self._log_factors:
            return measured
        known = self._curves.get(worker_id)
        if known is None or known[0] is not measured:
            known = self._curves[worker_id] = measured, replace(measured, scale=self.factor(worker_id))
        return known[1]

    def apply(self, worker: WorkerView) -> WorkerView:
        """The worker with its prefill curve as learnt."""
        curve = self.curve(worker.worker_id, worker.prefill_curve)
        return worker if curve is worker.prefill_curve else replace(worker, prefill_curve=curve)

    def forget(self, worker_id: str) -> None:
        """The worker is gone; another process under its id starts from its own measurements."""
        self._log_factors.pop(worker_id, None)
        self._curves.pop(worker_id, None)
