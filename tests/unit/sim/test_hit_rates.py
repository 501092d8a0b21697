"""What is found cached of an excerpt of a recorded workload, beside one cache as large as all pools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baton.bench.trace import TraceRow, read_trace
from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.optimum import single_cache_hit_rate
from baton.sim.report import SimReport
from baton.sim.simulator import simulate
from baton.sim.speed import TableSpeed
from baton.sim.workload import SimRequest, from_trace

EXCERPT = Path(__file__).resolve().parents[2] / "data" / "mooncake_conversation_excerpt.jsonl"
BLOCK = 512
SPEED = TableSpeed({512: 0.02, 131072: 8.0}, {(1, 512): 0.02, (128, 512): 0.05})
WORKER = WorkerSpec(Role.HYBRID, SPEED, kv_blocks=2000, max_batch_tokens=8192)
CLUSTER = SimCluster((WORKER,) * 4, BLOCK, kv_bytes_per_token=160_000)
SPLIT = replace(
    CLUSTER, workers=(replace(WORKER, role=Role.PREFILL),) * 2 + (replace(WORKER, role=Role.DECODE),) * 2
)


def asked() -> list[SimRequest]:
    return list(from_trace(read_trace(EXCERPT, "mooncake"), BLOCK))


def run(cluster: SimCluster, requests: list[SimRequest]) -> SimReport:
    return simulate(cluster, requests)


def made(*prompts: list[int]) -> list[SimRequest]:
    rows = [TraceRow(float(at), len(ids) * BLOCK, 1, ids, BLOCK) for at, ids in enumerate(prompts)]
    return list(from_trace(rows, BLOCK))


def test_one_cache_that_holds_everything_hits_every_repeated_block() -> None:
    assert single_cache_hit_rate(made([1, 2], [1, 2, 3, 4], [5, 6]), BLOCK, 100) == pytest.approx(2 / 8)


def test_one_cache_that_is_too_small_hits_less() -> None:
    requests = made([1, 2], [3, 4], [1, 2, 5])
    assert single_cache_hit_rate(requests, BLOCK, 100) == pytest.approx(2 / 7)
    assert single_cache_hit_rate(requests, BLOCK, 3) < 2 / 7


def test_prefix_comes_near_one_cache_of_the_same_size_and_spreads_the_work() -> None:
    requests = asked()
    report = run(CLUSTER, requests)
    assert report.hit_rate > single_cache_hit_rate(requests, BLOCK, 4 * 2000) - 0.02
    assert report.hit_rate > 1.25 * run(replace(CLUSTER, policy="least-loaded"), requests).hit_rate
    assert report.imbalance(Role.HYBRID) < 1.2


def test_separate_workers_do_not_keep_two_copies_for_long() -> None:
    requests = asked()
    small = tuple(replace(worker, kv_blocks=1000) for worker in SPLIT.workers)
    report = run(replace(SPLIT, workers=small), requests)
    assert report.hit_rate > single_cache_hit_rate(requests, BLOCK, 4 * 1000) - 0.03


def test_two_routers_do_about_as_well_as_one() -> None:
    requests = asked()
    one, two = run(CLUSTER, requests), run(replace(CLUSTER, routers=2), requests)
    assert two.hit_rate == pytest.approx(one.hit_rate, abs=0.01)
    assert two.imbalance(Role.HYBRID) < 1.25
