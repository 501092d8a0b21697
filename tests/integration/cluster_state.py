"""What tests ask running clusters about themselves, and wait for: counters, who is there, what is held."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import Cluster

BLOCK = 16
"""Tokens per KV block, on CPU."""

_PATIENCE_S = 60.0


def until(condition: Callable[[], object], what: str | Callable[[], object]) -> None:
    """Wait for a condition; when it does not come true in a minute, say `what`: words or what is seen."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.05)


def samples(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a /metrics page by name and labels."""
    text = httpx.get(f"http://{address.removeprefix('http://')}/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def counter(address: str, name: str, **labels: str) -> float:
    """The sum of the samples of that name that have these labels; 0 where nothing has been counted yet."""
    return sum(
        value
        for (found, has), value in samples(address).items()
        if found == name and labels.items() <= dict(has).items()
    )


def fresh_prompt(length: int) -> list[int]:
    """Tokens that no worker has seen."""
    draw = random.SystemRandom()
    return [draw.randrange(100, 4000) for _ in range(length)]


def pulls(cluster: Cluster, worker_id: str, outcome: str) -> float:
    return counter(cluster.status(worker_id).metrics_address, "baton_pulls_total", outcome=outcome)


def nothing_is_held(cluster: Cluster) -> bool:
    """Whether no worker keeps blocks for anybody."""
    statuses = [cluster.status(name) for name in cluster.workers()]
    return not any(s.pinned_blocks or s.handoffs_serving or s.handoffs_reading for s in statuses)


def started_anew(cluster: Cluster, worker_id: str, incarnation: str) -> bool:
    """Whether another process than this incarnation answers in the worker's place."""
    with suppress(KeyError, grpc.RpcError):
        return cluster.status(worker_id).incarnation != incarnation
    return False


def wait_for_workers(cluster: Cluster, *worker_ids: str) -> None:
    """Until all of them are in the registry."""
    until(lambda: set(worker_ids) <= cluster.workers().keys(), cluster.workers)
