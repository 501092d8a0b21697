"""Which placements there are for a request, and what each is predicted to cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import nsmallest
from math import inf
from typing import NamedTuple

from baton.routing.choice import requests_on, tolerance_s
from baton.routing.cost import (
    HANDOFF_S,
    PrefillCost,
    beside_decoding,
    decode_cost_s,
    interference_s,
    prefill_cost,
    pull_sources,
    pushed_out,
    transfer_s,
)
from baton.routing.placement import WAITING, Candidate, Placement, Terms
from baton.routing.view import ClusterView, Request, WorkerView

_SHORTLIST = 6
"""Prefill and decode workers that are weighed pair by pair: the best of each side, alone."""

_AFFINITY_S = 0.005
"""What staying with the conversation's worker is worth beyond the blocks that the index knows of: the
last answer's may not be in it yet."""

_CAUTION = 0.3
_CAUTION_S = 0.005


class _DecodeSide(NamedTuple):
    worker: WorkerView
    decode_s: float
    pushed_out: int
    affinity_s: float


class Offer(NamedTuple):
    """A placement not yet written out: many are compared, one is chosen."""

    total_s: float
    side: _DecodeSide
    prefill: PrefillCost
    transfer_s: float
    disturbs_s: float
    storage_s: float
    reason: str

    @property
    def first_token_s(self) -> float:
        return self.prefill.queue_s + self.prefill.work_s

    @property
    def load(self) -> tuple[float, float]:
        """How busy the workers are: requests where it would decode, tokens where it would prefill."""
        return requests_on(self.side.worker), self.prefill.worker.queued_tokens

    def placement(self, request: Request) -> Placement:
        """The offer with its terms."""
        side, prefill = self.side, self.prefill
        terms = Terms(
            queue_s=prefill.queue_s,
            tier_s=prefill.tier_s,
            pull_s=prefill.pull_s,
            compute_s=prefill.compute_s,
            transfer_s=self.transfer_s,
            interference_s=self.disturbs_s,
            decode_s=side.decode_s,
            storage_s=self.storage_s,
            affinity_s=side.affinity_s,
        )
        return Placement(
            decode=side.worker,
            prefill=None if prefill.worker is side.worker else prefill.worker,
            pull=prefill.pull,
            compute_tokens=request.prompt_tokens - prefill.cached_tokens,
            terms=terms,
            reason=self.reason,
        )


def all_candidates(request: Request, cluster: ClusterView) -> list[Candidate]:
    """Every pair of a decode worker with a prefill worker, and every decode worker alone.

    Raises:
        Unplaceable: see `ClusterView.decoders`.
    """
    sources, sides, prefills = _considered(request, cluster, cluster.decoders(request))
    found = [_pair(request, side, prefill) for side in sides for prefill in prefills]
    found += _local(request, sides, sources, bool(prefills))
    placements = [offer.placement(request) for offer in found]
    return [Candidate(placement, placement.terms.total_s(request.slo)) for placement in placements]


def offers(request: Request, cluster: ClusterView, decoders: Sequence[WorkerView]) -> list[Offer]:
    """The placements on `decoders` that are worth comparing (see `cheapest`)."""
    sources, sides, prefills = _considered(request, cluster, decoders)
    if not prefills:
        return _local(request, sides, sources, others_prefill=False)
    local = _local(request, _likely(request, sides), sources, others_prefill=True)
    return [*_near_pairs(request, sides, prefills), *local]


def _considered(
    request: Request, cluster: ClusterView, decoders: Sequence[WorkerView]
) -> tuple[list[WorkerView], list[_DecodeSide], list[PrefillCost]]:
    """Who may be pulled from, and what each worker would cost on its side."""
    sources = pull_sources(request, cluster)
    sides = [_decode_side(worker, request) for worker in decoders]
    return sources, sides, [prefill_cost(worker, request, sources) for worker in cluster.prefillers(request)]


def _decode_side(worker: WorkerView, request: Request) -> _DecodeSide:
    affinity_s = -_AFFINITY_S if worker.worker_id == request.session_worker else 0.0
    return _DecodeSide(worker, decode_cost_s(worker, request), pushed_out(worker, request), affinity_s)


def _near_pairs(
    request: Request, sides: Sequence[_DecodeSide], prefills: Sequence[PrefillCost]
) -> Iterator[Offer]:
    """Of the best workers of each side, alone, the pairs that may be as good as the best."""
    waiting = WAITING[request.slo]

    def alone(prefill: PrefillCost) -> tuple[float, int]:
        own_s = waiting * prefill.queue_s + prefill.work_s + prefill.pushed_out * prefill.block_s
        return own_s, prefill.worker.queued_tokens

    def beside_nearest(side: _DecodeSide) -> tuple[float, int]:
        read_s = transfer_s(side.worker, nearest.worker, request)
        stored_s = side.pushed_out * nearest.block_s
        return read_s + stored_s + side.decode_s + side.affinity_s, requests_on(side.worker)

    prefills = nsmallest(_SHORTLIST, prefills, key=alone)
    nearest = prefills[0]
    sides = nsmallest(_SHORTLIST, sides, key=beside_nearest)
    ranked = [(alone(prefill)[0] + HANDOFF_S, prefill) for prefill in prefills]
    alike_s = tolerance_s(max(prefill.queue_s + prefill.work_s for prefill in prefills))
    best_s = inf
    for side in sides:
        for least_s, prefill in ranked:
            # What the two cost alone and a handoff are the least that they cost together.
            if least_s + side.decode_s + side.affinity_s > best_s + alike_s:
                break
            offer = _pair(request, side, prefill)
            best_s = min(best_s, offer.total_s)
            yield offer


def _pair(request: Request, side: _DecodeSide, prefill: PrefillCost) -> Offer:
    """Prefilled by one worker, decoded by another that reads what it lacks."""
    return _offer(request, side, prefill, transfer_s(side.worker, prefill.worker, request), 0.0, "remote")


def _likely(request: Request, sides: Sequence[_DecodeSide]) -> Sequence[_DecodeSide]:
    """The sides that have something of the prompt, and of the others those where decoding costs least."""
    if len(sides) <= _SHORTLIST:
        return sides
    have = request.held.keys() | request.expected.keys()
    others = [side for side in sides if side.worker.worker_id not in have]
    nearest = nsmallest(_SHORTLIST, others, key=lambda side: (side.decode_s, requests_on(side.worker)))
    return [side for side in sides if side.worker.worker_id in have] + nearest


def _local(
    request: Request, sides: Sequence[_DecodeSide], sources: Sequence[WorkerView], others_prefill: bool
) -> list[Offer]:
    """Prefilled where it is decoded.

    Prefilling beside decoding requests disturbs more than can be predicted, so where there are prefill
    workers it is only done to be clearly faster, by 30 % and 5 ms, and on workers whose speed is known;
    except when no more than one block of the prompt is lacking.
    """
    found = []
    for side in sides:
        prefill = prefill_cost(side.worker, request, sources)
        disturbs_s = interference_s(side.worker, prefill)
        reason = "no prefill worker"
        if request.prompt_tokens - prefill.cached_tokens <= request.block_size:
            reason = "cached" if prefill.pull is None else "pulled"
        elif others_prefill:
            if not side.worker.prefill_curve.points:
                continue
            reason = "faster here"
            prefill, breached_s = beside_decoding(side.worker, request, prefill)
            disturbs_s = max(breached_s, least_disturbance_s(prefill.work_s))
        found.append(_offer(request, side, prefill, 0.0, disturbs_s, reason))
    return found


def least_disturbance_s(work_s: float) -> float:
    """What a prefill of so many seconds beside decoding requests weighs at least."""
    return max(_CAUTION_S, _CAUTION * work_s)


def _offer(
    request: Request,
    side: _DecodeSide,
    prefill: PrefillCost,
    read_s: float,
    disturbs_s: float,
    reason: str,
) -> Offer:
    """The total is that of `Terms`, added up here because most offers are never written out."""
    pushed = side.pushed_out + (0 if prefill.worker is side.worker else prefill.pushed_out)
    storage_s = pushed * prefill.block_s
    own_s = WAITING[request.slo] * prefill.queue_s + prefill.work_s + read_s + side.decode_s
    total_s = own_s + disturbs_s + storage_s + side.affinity_s
    return Offer(total_s, side, prefill, read_s, disturbs_s, storage_s, reason)


def plain(decode: WorkerView, prefill: WorkerView | None, request: Request, reason: str) -> Placement:
    """The placement of a policy that does not compare predictions."""
    side = _decode_side(decode, request)
    cost = prefill_cost(prefill or decode, request)
    between_s = transfer_s(decode, prefill, request) if prefill is not None else 0.0
    disturbs_s = interference_s(decode, cost) if prefill is None else 0.0
    return _offer(request, side, cost, between_s, disturbs_s, reason).placement(request)
