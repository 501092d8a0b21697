"""random: place anywhere that can hold the request."""

from __future__ import annotations

from random import Random

from baton.routing.cost import prefill_cost
from baton.routing.view import ClusterView, Placement, Policy, Request


class RandomPolicy(Policy):
    """Draws the decode worker and the prefill worker, each with equal odds."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def place(self, request: Request, cluster: ClusterView) -> Placement:
        """Draw the workers.

        Raises:
            Unplaceable: see `ClusterView.decoders`.
        """
        decode = self._rng.choice(cluster.decoders(request))
        prefillers = cluster.prefillers(request)
        prefill = self._rng.choice(prefillers) if prefillers else None
        return Placement(decode, prefill, prefill_cost(prefill or decode, request).total_s, "drawn")
