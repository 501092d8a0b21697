"""What a placement costs: predicted seconds until the first token, and seconds it takes from others.

Costs are request-seconds: a second that each of ten running requests has to wait counts ten. A curve
that was not measured predicts 0 s, which leaves the choice to load (see `baton.routing.choice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from math import inf, log
from typing import NamedTuple

from baton.routing.pacing import Pace
from baton.routing.placement import PullSource
from baton.routing.view import ClusterView, Request, WorkerView

HANDOFF_S = 0.001
"""Seconds a handoff adds however little it moves: one stream opened, one read started."""

_SOURCES = 3
"""Workers considered to pull from: those that hold the most. Those that hold less save less."""

_BREACH = 4.0
"""How much more a wait counts that is longer than an ITL target allows than any other."""

_FORESEEN_STEPS = 64
"""Decode steps over which a request's weight on its batch is counted: outputs end unannounced, so
counting up to max_tokens would let a hypothetical future outweigh the queue that is there now."""


class PrefillCost(NamedTuple):
    """Prefill of one request on one worker. The seconds are those of `Terms`.

    `cached_tokens` are the leading tokens that need not be computed, `pushed_out` the cached blocks that go
    from the worker's pool and `block_s` what each is worth, see `pushed_out` and `block_s`.
    """

    worker: WorkerView
    cached_tokens: int
    queue_s: float
    tier_s: float
    pull_s: float
    compute_s: float
    pull: PullSource | None
    pushed_out: int
    block_s: float

    @property
    def work_s(self) -> float:
        """All but the queue."""
        return self.tier_s + self.pull_s + self.compute_s


def compute_s(worker: WorkerView, prompt_tokens: int, cached_tokens: int) -> float:
    """Predicted seconds to compute a prompt of which the KV of the first tokens is at hand.

    Attention over the cached part is work too, so the uncached part costs what it adds to a prompt of
    the cached length, and no less than a prompt of its own length.
    """
    seconds = worker.prefill_curve.seconds
    alone = seconds(prompt_tokens - cached_tokens)
    return max(alone, seconds(prompt_tokens) - seconds(cached_tokens)) if cached_tokens else alone


def tier_s(worker: WorkerView, request: Request, first: int, end: int) -> float:
    """Seconds to bring the blocks `first` to `end` of those the worker holds up from its slower tiers.

    Infinite when some lie in a tier of unknown bandwidth.
    """
    held = request.held_by_tier(worker.worker_id)
    if end <= held.device:
        return 0.0
    host_from, disk_from = held.device, held.device + held.host
    host = max(0, min(end, disk_from) - max(first, host_from))
    disk = max(0, end - max(first, disk_from))
    return _seconds(host * request.block_bytes, worker.host_bytes_per_s) + _seconds(
        disk * request.block_bytes, worker.disk_bytes_per_s
    )


def pull_sources(request: Request, cluster: ClusterView) -> list[WorkerView]:
    """The workers whose prefix others may want to read: the few that hold the most of it. Those that drain
    are read from as long as they are there."""
    held = request.held
    if not held:
        return []
    holders = [
        worker
        for worker in cluster.workers
        if held.get(worker.worker_id, 0) and worker.worker_id not in request.avoid
    ]
    return nlargest(_SOURCES, holders, key=lambda worker: held[worker.worker_id])


def prefill_cost(worker: WorkerView, request: Request, sources: Sequence[WorkerView] = ()) -> PrefillCost:
    """Predicted seconds until the worker has computed the prompt, with the least that it need compute.

    What it holds in slower tiers is read or computed, whichever is faster; so is what only one of
    `sources` holds.
    """
    held = request.held_by_tier(worker.worker_id)
    prompt_tokens, tokens_in = request.prompt_tokens, request.tokens_in
    own, tiers_s, pulling_s, pull = request.on_device(worker.worker_id), 0.0, 0.0, None
    cached = tokens_in(own)
    computing_s = compute_s(worker, prompt_tokens, cached)
    work_s = computing_s
    if held.total > own:
        for blocks in (held.device + held.host, held.total):
            reading_s = tier_s(worker, request, 0, blocks)
            left_s = compute_s(worker, prompt_tokens, tokens_in(blocks))
            if reading_s + left_s < work_s:
                own, tiers_s, computing_s, work_s = blocks, reading_s, left_s, reading_s + left_s
                cached = tokens_in(blocks)
    for source in sources:
        blocks = request.held[source.worker_id]
        if blocks <= own or source.worker_id == worker.worker_id:
            continue
        read_s = _seconds((blocks - own) * request.block_bytes, worker.bandwidth_from(source.worker_id))
        reading_s = HANDOFF_S + read_s + tier_s(source, request, own, blocks)
        if tiers_s + reading_s >= work_s:
            continue
        left_s = compute_s(worker, prompt_tokens, tokens_in(blocks))
        if tiers_s + reading_s + left_s < work_s:
            pulling_s, computing_s, work_s = reading_s, left_s, tiers_s + reading_s + left_s
            cached, pull = tokens_in(blocks), PullSource(source, blocks)
    return PrefillCost(
        worker,
        cached,
        worker.backlog_s,
        tiers_s,
        pulling_s,
        computing_s,
        pull,
        pushed_out(worker, request),
        block_s(worker, request),
    )


def pushed_out(worker: WorkerView, request: Request) -> int:
    """Cached blocks that must go from the worker's pool when the prompt's come."""
    new = request.prompt_blocks - request.on_device(worker.worker_id)
    empty = max(0, worker.free_blocks - worker.cached_blocks)
    return max(0, new - empty)


def block_s(worker: WorkerView, request: Request) -> float:
    """Seconds to have a block like the prompt's again: computed, or read from the host tier.

    That is what a block pushed out is worth: it is taken to be wanted once more. Where nothing is ever
    wanted twice, this is the same for every placement and decides nothing; where prefixes are, it keeps
    copies of one prefix from filling every pool.
    """
    computed_s = worker.prefill_curve.seconds(request.prompt_tokens) / request.prompt_blocks
    return min(computed_s, _seconds(request.block_bytes, worker.host_bytes_per_s))


def interference_s(worker: WorkerView, prefill: PrefillCost) -> float:
    """Request-seconds that requests decoding on the worker lose to a prefill there."""
    return worker.running * prefill.compute_s


def beside_decoding(worker: WorkerView, request: Request, prefill: PrefillCost) -> tuple[PrefillCost, float]:
    """The prefill on a decode worker to which others bring prompts, and what it weighs that it disturbs.

    A worker that can keep to its ITL target meanwhile computes the prompt in smaller steps and disturbs
    nobody beyond what was agreed to. Any other breaks off, which all wait for who decode there, and whose
    prompts are being prefilled elsewhere and come meanwhile. That weighs more where it breaks the target.
    """
    pace = Pace(worker.itl_target_s, worker.prefill_curve, worker.decode_curve, log(worker.step_factor))
    paced_s = pace.paced_s(max(1, worker.running), request.prompt_tokens - prefill.cached_tokens)
    if paced_s is not None:
        return prefill._replace(compute_s=max(paced_s, prefill.compute_s)), 0.0
    others = worker.running + worker.waiting
    if not worker.itl_target_s:
        return prefill, others * prefill.compute_s
    return prefill, _BREACH * max(1, others) * prefill.compute_s  # there will be somebody meanwhile


def transfer_s(decode: WorkerView, prefill: WorkerView, request: Request) -> float:
    """Seconds to bring the prompt's KV to `decode`, from its own slower tiers where that is faster."""
    held = request.held_by_tier(decode.worker_id)
    bandwidth = decode.bandwidth_from(prefill.worker_id)
    lacking = request.prompt_blocks - held.device
    read_s = _seconds(lacking * request.block_bytes, bandwidth)
    if held.total > held.device:
        lacking_s = _seconds((request.prompt_blocks - held.total) * request.block_bytes, bandwidth)
        read_s = min(read_s, tier_s(decode, request, 0, held.total) + lacking_s)
    return HANDOFF_S + read_s


def decode_cost_s(worker: WorkerView, request: Request) -> float:
    """Request-seconds that decoding the request adds on the worker, its own included.

    With n requests there now, a step takes n * step(n) request-seconds in all, then (n + 1) *
    step(n + 1). Missing blocks must first be given back by requests that end.
    """
    step = worker.decode_curve.seconds
    there = worker.running + worker.waiting
    output_tokens = request.blocks * request.block_size - request.prompt_tokens
    steps = max(1, min(_FORESEEN_STEPS, output_tokens))
    added = steps * ((there + 1) * step(there + 1) - there * step(there))
    missing = request.missing_blocks(worker)
    if missing:
        in_use = max(1, worker.total_blocks - worker.free_blocks)
        requests_to_end = missing * max(1, worker.running) / in_use
        added += requests_to_end * _FORESEEN_STEPS * step(max(1, worker.running))
    return added


def _seconds(amount: float, bytes_per_s: float) -> float:
    if amount <= 0:
        return 0.0
    return amount / bytes_per_s if bytes_per_s > 0 else inf
