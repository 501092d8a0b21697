"""Which placements there are for a request, and what each is predicted to cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest

from baton.routing.choice import requests_on
from baton.routing.cost import (
    PrefillCost,
    block_s,
    decode_cost_s,
    interference_s,
    prefill_cost,
    pull_sources,
    pushed_out,
    transfer_s,
)
from baton.routing.placement import Candidate, Placement, Terms
from baton.routing.view import ClusterView, Request, WorkerView

_SHORTLIST = 6
"""Prefill and decode workers that are weighed pair by pair: the best of each side, alone."""

_AFFINITY_S = 0.005
"""What staying with the conversation's worker is worth beyond the blocks that the index knows of: the
last answer's may not be in it yet."""

_CAUTION = 0.3
_CAUTION_S = 0.005


@dataclass(frozen=True, slots=True)
class _DecodeSide:
    worker: WorkerView
    decode_s: float
    pushed_out: int
    affinity_s: float


def all_candidates(request: Request, cluster: ClusterView) -> list[Candidate]:
    """Every pair of a decode worker with a prefill worker, and every decode worker alone.

    Raises:
        Unplaceable: see `ClusterView.decoders`.
    """
    return candidates(request, cluster, cluster.decoders(request), shortlist=len(cluster.workers))


def candidates(
    request: Request, cluster: ClusterView, decoders: Sequence[WorkerView], shortlist: int = _SHORTLIST
) -> list[Candidate]:
    """The placements on `decoders` that are worth comparing, `shortlist` workers of each side at most."""
    sources = pull_sources(request, cluster)
    sides = [_decode_side(worker, request) for worker in decoders]
    prefillers = cluster.prefillers(request)
    return [
        *_remote(request, sides, [prefill_cost(w, request, sources) for w in prefillers], shortlist),
        *_local(request, sides, sources, bool(prefillers)),
    ]


def _decode_side(worker: WorkerView, request: Request) -> _DecodeSide:
    stays = worker.worker_id == request.session_worker
    return _DecodeSide(
        worker, decode_cost_s(worker, request), pushed_out(worker, request), -_AFFINITY_S if stays else 0.0
    )


def _remote(
    request: Request, sides: Sequence[_DecodeSide], prefills: Sequence[PrefillCost], shortlist: int
) -> list[Candidate]:
    """Prefilled by one worker, decoded by another that reads what it lacks."""
    if len(prefills) > shortlist:
        prefills = nsmallest(shortlist, prefills, key=lambda p: (p.total_s, p.worker.queued_tokens))
    if len(sides) > shortlist and prefills:
        nearest = min(prefills, key=lambda p: p.total_s).worker
        sides = nsmallest(
            shortlist,
            sides,
            key=lambda side: (
                transfer_s(side.worker, nearest, request) + side.decode_s + side.affinity_s,
                requests_on(side.worker),
            ),
        )
    return [
        _candidate(request, side, prefill, transfer_s(side.worker, prefill.worker, request), 0.0, "remote")
        for side in sides
        for prefill in prefills
    ]


def _local(
    request: Request, sides: Sequence[_DecodeSide], sources: Sequence[WorkerView], others_prefill: bool
) -> list[Candidate]:
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
            reason = "cached"
        elif others_prefill:
            if not side.worker.prefill_curve.points:
                continue
            reason = "faster here"
            disturbs_s += max(_CAUTION_S, _CAUTION * prefill.work_s)
        found.append(_candidate(request, side, prefill, 0.0, disturbs_s, reason))
    return found


def _candidate(
    request: Request,
    side: _DecodeSide,
    prefill: PrefillCost,
    transfer_s: float,
    disturbs_s: float,
    reason: str,
) -> Candidate:
    prefilling = None if prefill.worker is side.worker else prefill.worker
    blocks_out = side.pushed_out + (0 if prefilling is None else pushed_out(prefilling, request))
    terms = Terms(
        queue_s=prefill.queue_s,
        tier_s=prefill.tier_s,
        pull_s=prefill.pull_s,
        compute_s=prefill.compute_s,
        transfer_s=transfer_s,
        interference_s=disturbs_s,
        decode_s=side.decode_s,
        storage_s=blocks_out * block_s(prefill.worker, request) if blocks_out else 0.0,
        affinity_s=side.affinity_s,
    )
    placement = Placement(
        decode=side.worker,
        prefill=prefilling,
        pull=prefill.pull,
        compute_tokens=request.prompt_tokens - prefill.cached_tokens,
        terms=terms,
        reason=reason,
    )
    return Candidate(placement, terms.total_s(request.slo))


def plain(decode: WorkerView, prefill: WorkerView | None, request: Request, reason: str) -> Placement:
    """The placement of a policy that does not compare predictions."""
    side = _decode_side(decode, request)
    cost = prefill_cost(prefill or decode, request)
    between_s = transfer_s(decode, prefill, request) if prefill is not None else 0.0
    disturbs_s = interference_s(decode, cost) if prefill is None else 0.0
    return _candidate(request, side, cost, between_s, disturbs_s, reason).placement
