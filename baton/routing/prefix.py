"""prefix: place where the first token is predicted soonest, cached prefixes and queues considered."""

from __future__ import annotations

from random import Random

from baton.routing.choice import cheapest, requests_on, roomy
from baton.routing.cost import HANDOFF_S, decode_cost_s, interference_s, prefill_cost, read_s
from baton.routing.view import ClusterView, Placement, Policy, Request, WorkerView

_CLEARLY_FASTER = 0.3
_CLEARLY_FASTER_S = 0.005


class Prefix(Policy):
    """Weighs every decode worker with every prefill worker and with no prefill worker.

    What a prefill worker costs and what a decode worker costs add up, so the best pair is the best of
    each. Prefilling on the decode worker disturbs everything that will decode there, more than can be
    predicted, so it must be clearly faster, by 30 % and 5 ms; except when the decode worker lacks no
    more than one block of the prompt.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def place(self, request: Request, cluster: ClusterView) -> Placement:
        """Choose the decode worker and, unless it should prefill itself, the prefill worker.

        Raises:
            Unplaceable: see `ClusterView.decoders`.
        """
        decoders = roomy(cluster.decoders(request), request)
        prefillers = cluster.prefillers(request)
        decoding = {worker.worker_id: decode_cost_s(worker, request) for worker in decoders}

        def local_cost(worker: WorkerView) -> float:
            prefill = prefill_cost(worker, request)
            return prefill.total_s + interference_s(worker, prefill) + decoding[worker.worker_id]

        def local(worker: WorkerView, reason: str) -> Placement:
            return Placement(worker, None, prefill_cost(worker, request).total_s, reason)

        locals_ = [(local_cost(worker), worker) for worker in decoders]
        if not prefillers:
            return local(cheapest(self._rng, locals_, requests_on)[1], "no prefill worker")

        prefill_s, prefill = cheapest(
            self._rng,
            [(prefill_cost(worker, request).total_s, worker) for worker in prefillers],
            lambda worker: worker.queued_tokens,
        )
        remotes = [(read_s(worker, request) + decoding[worker.worker_id], worker) for worker in decoders]
        decode_s, decode = cheapest(self._rng, remotes, requests_on)
        remote_s = prefill_s + HANDOFF_S + decode_s

        cached = [offer for offer in locals_ if request.uncached_tokens(offer[1]) <= request.block_size]
        if cached:
            cost_s, worker = cheapest(self._rng, cached, requests_on)
            if cost_s <= remote_s:
                return local(worker, "cached")
        # A curve that was not measured must not make its worker look infinitely fast.
        measured = [offer for offer in locals_ if offer[1].prefill_curve.points]
        if measured and prefill.prefill_curve.points:
            cost_s, worker = cheapest(self._rng, measured, requests_on)
            prefilling_s = remote_s - decoding[decode.worker_id]
            if remote_s - cost_s >= max(_CLEARLY_FASTER_S, _CLEARLY_FASTER * prefilling_s):
                return local(worker, "faster here")
        return Placement(decode, prefill, prefill_s + HANDOFF_S, "remote")
