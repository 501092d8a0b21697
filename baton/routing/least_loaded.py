"""least-loaded: place where the least work is promised, wherever prefixes may be cached."""

from __future__ import annotations

from random import Random

from baton.routing.candidates import plain
from baton.routing.choice import least, requests_on, roomy
from baton.routing.placement import Placement
from baton.routing.policy import Policy
from baton.routing.view import ClusterView, Request


class LeastLoaded(Policy):
    """Ignores prefixes; the baseline that every smarter policy must beat.

    Prefill work is prompt tokens promised and not yet computed, decode work is requests.
    """

    weighs = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, cluster: ClusterView) -> Placement:
        """The decode worker with the fewest requests and the prefill worker with the fewest tokens."""
        decode = least(self._rng, roomy(cluster.decoders(request), request), requests_on)
        prefillers = cluster.prefillers(request)
        prefill = least(self._rng, prefillers, lambda w: w.queued_tokens) if prefillers else None
        return plain(decode, prefill, request, "least loaded")
