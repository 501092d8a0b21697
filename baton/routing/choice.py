"""How the least of many is chosen when several are as good as equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from baton.routing.view import Request, WorkerView

T = TypeVar("T")


def least(rng: Random, items: Sequence[T], key: Callable[[T], float]) -> T:
    """An item with the least key; equal ones are drawn from at random.

    Without the draw, routers that see the same cluster would all send to the same worker.
    """
    keys = [key(item) for item in items]
    smallest = min(keys)
    return rng.choice([item for item, value in zip(items, keys, strict=True) if value == smallest])


def cheapest(rng: Random, offers: Sequence[tuple[float, T]], load: Callable[[T], float]) -> tuple[float, T]:
    """An offer (cost in seconds, item) of the least cost.

    Predictions are not that exact: offers within 1 % and 0.1 ms of the least count as equal, and of
    those the least loaded item is taken. So work spreads even where no cost is known.
    """
    limit = min(cost for cost, _ in offers) * 1.01 + 1e-4
    near = [offer for offer in offers if offer[0] <= limit]
    return least(rng, near, lambda offer: load(offer[1]))


def requests_on(worker: WorkerView) -> int:
    """Requests the worker has, admitted or not."""
    return worker.running + worker.waiting


def roomy(workers: Sequence[WorkerView], request: Request) -> Sequence[WorkerView]:
    """Those of `workers` that have blocks for the prompt now; all of them when none has."""
    return [worker for worker in workers if request.missing_blocks(worker) == 0] or workers
