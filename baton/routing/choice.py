"""How the least of many is chosen when several are as good as equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from baton.routing.placement import Candidate, Placement
from baton.routing.view import Request, WorkerView

T = TypeVar("T")
Load = float | tuple[float, ...]


def least(rng: Random, items: Sequence[T], key: Callable[[T], Load]) -> T:
    """An item with the least key; equal ones are drawn from at random.

    Without the draw, routers that see the same cluster would all send to the same worker.
    """
    keys = [key(item) for item in items]
    smallest = min(keys)
    return rng.choice([item for item, value in zip(items, keys, strict=True) if value == smallest])


def cheapest(rng: Random, candidates: Sequence[Candidate]) -> Candidate:
    """A candidate of the least total.

    Predictions are not that exact: totals that exceed the least by 0.1 ms and 1 % of its seconds to the
    first token count as equal, and of those the least loaded is taken. So work spreads even where no
    cost is known.
    """
    best = min(candidates, key=lambda candidate: candidate.total_s)
    limit = best.total_s + 0.01 * best.placement.terms.first_token_s + 1e-4
    near = [candidate for candidate in candidates if candidate.total_s <= limit]
    return least(rng, near, lambda candidate: load(candidate.placement))


def load(placement: Placement) -> tuple[float, float]:
    """How busy the workers are: requests where it would decode, tokens where it would prefill."""
    return requests_on(placement.decode), placement.computing.queued_tokens


def requests_on(worker: WorkerView) -> int:
    """Requests the worker has, admitted or not."""
    return worker.running + worker.waiting


def roomy(workers: Sequence[WorkerView], request: Request) -> Sequence[WorkerView]:
    """Those of `workers` that have blocks for the prompt now; all of them when none has."""
    return [worker for worker in workers if request.missing_blocks(worker) == 0] or workers
