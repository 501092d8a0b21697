"""round-robin: place on the workers in turn."""

from __future__ import annotations

from collections.abc import Sequence

from baton.routing.candidates import plain
from baton.routing.placement import Placement
from baton.routing.policy import Policy
from baton.routing.view import ClusterView, Request, WorkerView


class RoundRobin(Policy):
    """Takes prefill workers and decode workers in the order of their ids, each in turn."""

    def __init__(self) -> None:
        self._last_decode = ""
        self._last_prefill = ""

    def choose(self, request: Request, cluster: ClusterView) -> Placement:
        """The workers whose turn it is."""
        decode = _next(cluster.decoders(request), self._last_decode)
        prefillers = cluster.prefillers(request)
        prefill = _next(prefillers, self._last_prefill) if prefillers else None
        return plain(decode, prefill, request, "next in turn")

    def place(self, request: Request, cluster: ClusterView) -> Placement:
        """The workers whose turn it is; it is the next ones' then."""
        placement = self.choose(request, cluster)
        self._last_decode = placement.decode.worker_id
        if placement.prefill is not None:
            self._last_prefill = placement.prefill.worker_id
        return placement


def _next(workers: Sequence[WorkerView], last: str) -> WorkerView:
    """The worker whose id follows `last`, the first after the last one."""
    return min(workers, key=lambda worker: (worker.worker_id <= last, worker.worker_id))
