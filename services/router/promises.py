"""What each worker has to do: what it last reported, and what it has been promised since."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, Protocol

from baton.routing import WorkerView
from baton.rpc.kvstore_messages import step_factor
from baton.rpc.v1 import worker_pb2

# How long a message may be under way: a load report that comes this much later than a promise was
# made has the promised work in it.
_IN_FLIGHT_S = 0.05


class Work(NamedTuple):
    """Requests, prompt tokens to compute and blocks to fill."""

    requests: int = 0
    queued_tokens: int = 0
    blocks: int = 0


_NOTHING = Work()


class Promise:
    """Work given to a worker that it does not report yet."""

    __slots__ = ("made_s", "work", "worker_id")

    def __init__(self, worker_id: str, work: Work, made_s: float) -> None:
        self.worker_id = worker_id
        self.work = work
        self.made_s = made_s


class Reservations(Protocol):
    """What routers tell each other of their promises: requests, queued tokens and blocks by worker id."""

    def publish(self, totals: Mapping[str, tuple[int, int, int]]) -> None:
        """Share what this router has promised in all, which may go on changing."""

    def others(self) -> Mapping[str, tuple[int, int, int]]:
        """What all other routers together have promised."""


class Promises:
    """The router's promises to all workers, and views of workers with all routers' promises counted in."""

    def __init__(self, corrected: Callable[[WorkerView], WorkerView], shared: Reservations) -> None:
        """`corrected` gives a worker's view with what was learnt of its curves."""
        self._corrected = corrected
        self._shared = shared
        self._loads: dict[str, worker_pb2.WorkerLoad] = {}
        self._pending: dict[str, dict[Promise, None]] = {}  # oldest first
        self._totals: dict[str, Work] = {}
        self._views: dict[str, tuple[WorkerView, tuple[int, int, int], WorkerView]] = {}

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
        theirs = self._shared.others().get(worker_id, _NOTHING)
        cached = self._views.get(worker_id)
        # The registry's views are replaced when they change, never altered.
        if cached is not None and cached[0] is registered and cached[1] == theirs:
            return cached[2]
        mine = self._totals.get(worker_id, _NOTHING)
        promised = Work(*(one + other for one, other in zip(mine, theirs, strict=True)))
        view = self._compute(self._corrected(registered), promised)
        self._views[worker_id] = (registered, theirs, view)
        return view

    def _compute(self, view: WorkerView, promised: Work) -> WorkerView:
        load = self._loads.get(view.worker_id)
        at = view if load is None else load
        return replace(
            view,
            free_blocks=max(0, at.free_blocks - promised.blocks),
            cached_blocks=at.cached_blocks,
            running=at.running,
            waiting=at.waiting + promised.requests,
            queued_tokens=at.queued_tokens + promised.queued_tokens,
            step_factor=view.step_factor if load is None else step_factor(load),
        )

    def _count(self, worker_id: str, work: Work, sign: int) -> None:
        total = self._totals.get(worker_id, _NOTHING)
        self._totals[worker_id] = Work(
            total.requests + sign * work.requests,
            total.queued_tokens + sign * work.queued_tokens,
            total.blocks + sign * work.blocks,
        )
        self._shared.publish(self._totals)
        self.outdated(worker_id)
