"""What a placement costs: predicted seconds until the first token, and seconds it takes from others.

Costs are request-seconds: a second that each of ten running requests has to wait counts ten. A curve
that was not measured predicts 0 s, which leaves the choice to load (see `baton.routing.choice`).
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.routing.view import Request, WorkerView

HANDOFF_S = 0.001
"""Seconds a handoff adds however little it moves: one stream opened, one read started."""

_FORESEEN_STEPS = 64
"""Decode steps over which a request's weight on its batch is counted: outputs end unannounced, so
counting up to max_tokens would let a hypothetical future outweigh the queue that is there now."""


@dataclass(frozen=True)
class PrefillCost:
    """Prefill of one request on one worker: seconds in its queue, seconds of computing."""

    queue_s: float
    compute_s: float

    @property
    def total_s(self) -> float:
        return self.queue_s + self.compute_s


def prefill_cost(worker: WorkerView, request: Request) -> PrefillCost:
    """Predicted seconds until the worker has computed what it lacks of the prompt.

    Attention over the cached part is work too, so the uncached part costs what it adds to a prompt of
    the cached length, and no less than a prompt of its own length.
    """
    cached = request.cached_tokens(worker.worker_id)
    seconds = worker.prefill_curve.seconds
    alone = seconds(request.prompt_tokens - cached)
    on_top = seconds(request.prompt_tokens) - seconds(cached) if cached else alone
    return PrefillCost(worker.backlog_s, max(alone, on_top))


def interference_s(worker: WorkerView, prefill: PrefillCost) -> float:
    """Request-seconds that requests decoding on the worker lose to a prefill there."""
    return worker.running * prefill.compute_s


def read_s(worker: WorkerView, request: Request) -> float:
    """Seconds to read the prompt blocks that the worker lacks; 0 when its bandwidth is not known."""
    if worker.read_bytes_per_s <= 0:
        return 0.0
    lacking = max(0, request.prompt_blocks - request.held.get(worker.worker_id, 0))
    return lacking * request.block_bytes / worker.read_bytes_per_s


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
