"""random: place anywhere that can hold the request."""

from __future__ import annotations

from random import Random

from baton.routing.candidates import plain
from baton.routing.placement import Placement
from baton.routing.policy import Policy
from baton.routing.view import ClusterView, Request


class RandomPolicy(Policy):
    """Draws the decode worker and the prefill worker, each with equal odds."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, cluster: ClusterView) -> Placement:
        """Workers drawn anew at every call; see `Policy.choose`."""
        decode = self._rng.choice(cluster.decoders(request))
        prefillers = cluster.prefillers(request)
        prefill = self._rng.choice(prefillers) if prefillers else None
        return plain(decode, prefill, request, "drawn")
