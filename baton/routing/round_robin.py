"""round-robin: place on the workers in turn."""

from __future__ import annotations

from collections.abc import Sequence

from baton.routing.cost import prefill_cost
from baton.routing.view import ClusterView, Placement, Policy, Request, WorkerView


class RoundRobin(Policy):
    """Takes prefill workers and decode workers in the order of their ids, each in turn."""

    def __init__(self) -> None:
        self._last_decode = ""
        self._last_prefill = ""

    def place(self, request: Request, cluster: ClusterView) -> Placement:
        """Choose the next decode worker and the next prefill worker.

        Raises:
            Unplaceable: see `ClusterView.decoders`.
        """
        decode = _next(cluster.decoders(request), self._last_decode)
        self._last_decode = decode.worker_id
        prefill = None
        prefillers = cluster.prefillers(request)
        if prefillers:
            prefill = _next(prefillers, self._last_prefill)
            self._last_prefill = prefill.worker_id
        return Placement(decode, prefill, prefill_cost(prefill or decode, request).total_s, "next in turn")


def _next(workers: Sequence[WorkerView], last: str) -> WorkerView:
    """The worker whose id follows `last`, the first after the last one."""
    return min(workers, key=lambda worker: (worker.worker_id <= last, worker.worker_id))
