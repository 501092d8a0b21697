"""What each worker has to do: what it last reported, and what it has been promised since."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from baton.routing import WorkerView
from baton.rpc.v1 import worker_pb2

# How long a message may be under way: a load report that comes this much later than a promise was
# made has the promised work in it.
_IN_FLIGHT_S = 0.05


@dataclass(frozen=True, slots=True)
class Work:
    """Requests, prompt tokens to compute and blocks to fill."""

    requests: int = 0
    queued_tokens: int = 0
    blocks: int = 0


class Promise:
    """Work given to a worker that it does not report yet."""

    __slots__ = ("made_s", "work", "worker_id")

    def __init__(self, worker_id: str, work: Work, made_s: float) -> None:
        self.worker_id = worker_id
        self.work = work
        self.made_s = made_s


class Promises:
    """The router's promises to all workers, and views of workers with the promises counted in."""

    def __init__(self, corrected: Callable[[WorkerView], WorkerView]) -> None:
        """`corrected` gives a worker's view with what was learnt of its curves."""
        self._corrected = corrected
        self._loads: dict[str, worker_pb2.WorkerLoad] = {}
        self._pending: dict[str, dict[Promise, None]] = {}  # oldest first
        self._totals: dict[str, Work] = {}
        self._views: dict[str, tuple[WorkerView, WorkerView]] = {}

    def make(self, worker_id: str, work: Work) -> Promise:
        """Count `work` as the worker's until it is released or reported."""
        promise = Promise(worker_id, work, time.monotonic())
        self._pending.setdefault(worker_id, {})[promise] = None
        self._count(worker_id, work, 1)
        return promise

    def release(self, promise: Promise) -> None:
        """The worker has the work, or will never have it."""
        pending = self._pending.get(promise.worker_id)
        if pending is not None and promise in pending:
            del pending[promise]
            self._count(promise.worker_id, promise.work, -1)

    def on_load(self, worker_id: str, load: worker_pb2.WorkerLoad) -> None:
        """A worker reported; work promised before the report left is in it."""
        self._loads[worker_id] = load
        self.outdated(worker_id)
        reported_before_s = time.monotonic() - _IN_FLIGHT_S
        pending = self._pending.get(worker_id, {})
        while pending and (oldest := next(iter(pending))).made_s < reported_before_s:
            self.release(oldest)

    def outdated(self, worker_id: str) -> None:
        """Something in the worker's view has changed."""
        self._views.pop(worker_id, None)

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        for known in (self._loads, self._pending, self._totals, self._views):
            known.pop(worker_id, None)

    def view(self, registered: WorkerView) -> WorkerView:
        """The worker as it is now, promised work included."""
        worker_id = registered.worker_id
        cached = self._views.get(worker_id)
        # The registry's views are replaced when they change, never altered.
        if cached is not None and cached[0] is registered:
            return cached[1]
        view = self._compute(self._corrected(registered))
        self._views[worker_id] = (registered, view)
        return view

    def _compute(self, view: WorkerView) -> WorkerView:
        load = self._loads.get(view.worker_id)
        promised = self._totals.get(view.worker_id)
        if load is None and promised is None:
            return view
        promised = promised or Work()
        at = view if load is None else load
        return replace(
            view,
            free_blocks=max(0, at.free_blocks - promised.blocks),
            cached_blocks=at.cached_blocks,
            running=at.running,
            waiting=at.waiting + promised.requests,
            queued_tokens=at.queued_tokens + promised.queued_tokens,
        )

    def _count(self, worker_id: str, work: Work, sign: int) -> None:
        total = self._totals.get(worker_id, Work())
        self._totals[worker_id] = Work(
            total.requests + sign * work.requests,
            total.queued_tokens + sign * work.queued_tokens,
            total.blocks + sign * work.blocks,
        )
        self.outdated(worker_id)
