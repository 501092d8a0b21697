"""session: keep a conversation on one decode worker, named by the hash of its session id."""

from __future__ import annotations

from hashlib import blake2b
from random import Random

from baton.routing.candidates import offers
from baton.routing.choice import cheapest, least, requests_on, roomy
from baton.routing.placement import Placement
from baton.routing.policy import Policy
from baton.routing.view import ClusterView, Request, WorkerView


class Session(Policy):
    """Rendezvous hashing over the decode workers: when one goes, only its own conversations move.

    Every router chooses the same worker, with nothing shared between them. A request without a session
    goes to the decode worker with the fewest requests. Who prefills is chosen as `prefix` does.
    """

    prefills_beside = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, cluster: ClusterView) -> Placement:
        """The best placement on the session's decode worker; see `Policy.choose`."""
        decoders = cluster.decoders(request)
        if request.session:
            decode = max(decoders, key=lambda worker: _weight(request.session, worker))
        else:
            decode = least(self._rng, roomy(decoders, request), requests_on)
        return cheapest(self._rng, offers(request, cluster, [decode])).placement(request)


def _weight(session: str, worker: WorkerView) -> bytes:
    return blake2b(f"{worker.worker_id}\0{session}".encode(), digest_size=8).digest()
