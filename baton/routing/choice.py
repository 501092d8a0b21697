"""How the least of many is chosen when several are as good as equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol, TypeVar

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


class Weighed(Protocol):
    """What `cheapest` compares."""

    @property
    def total_s(self) -> float: ...
    @property
    def first_token_s(self) -> float: ...
    @property
    def load(self) -> Load: ...


W = TypeVar("W", bound=Weighed)


def tolerance_s(first_token_s: float) -> float:
    """Seconds by which a total may exceed the least, whose first token is so far away, and count as equal:
    predictions are not exact."""
    return 0.01 * first_token_s + 1e-4


def cheapest(rng: Random, offers: Sequence[W]) -> W:
    """An offer of the least total.

    Of those that are as good as equal the least loaded is taken. So work spreads even where no cost is
    known.
    """
    best = min(offers, key=lambda offer: offer.total_s)
    limit = best.total_s + tolerance_s(best.first_token_s)
    return least(rng, [offer for offer in offers if offer.total_s <= limit], lambda offer: offer.load)


def requests_on(worker: WorkerView) -> int:
    """Requests the worker has, admitted or not."""
    return worker.running + worker.waiting


def roomy(workers: Sequence[WorkerView], request: Request) -> Sequence[WorkerView]:
    """Those of `workers` that have blocks for the prompt now; all of them when none has."""
    return [worker for worker in workers if request.missing_blocks(worker) == 0] or workers
