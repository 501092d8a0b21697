"""prefix: place where the least is predicted to be lost, cached prefixes and queues considered."""

from __future__ import annotations

from random import Random

from baton.routing.candidates import offers
from baton.routing.choice import cheapest, roomy
from baton.routing.placement import Placement
from baton.routing.policy import Policy
from baton.routing.view import ClusterView, Request


class Prefix(Policy):
    """Weighs every decode worker with every prefill worker and with no prefill worker.

    What is weighed are the seconds of `Terms`: until the first token, and taken from other requests.
    """

    weighs = True
    prefills_beside = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, cluster: ClusterView) -> Placement:
        """The placement of the least total; see `Policy.choose`."""
        decoders = roomy(cluster.decoders(request), request)
        return cheapest(self._rng, offers(request, cluster, decoders)).placement(request)
