"""Mooncake (FAST 2025) in the simulator: how much faster may its traces come, caches and roles well used?

Effective request capacity: the highest speed of a trace at which 90 % of the requests meet both targets, for
divisions of 16 workers into prefill and decode, and for prefix-aware against load-only placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.table import Table
from simulator_search import CONSOLE, GOOD, Figure, highest, ratio

from baton.bench.load import scaled
from baton.bench.summary import Targets
from baton.bench.trace import MOONCAKE_BLOCK_TOKENS, read_trace
from baton.bench.trace import TraceRow as Row
from baton.config import PolicyName
from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.optimum import single_cache_hit_rate
from baton.sim.profiles import speed_of
from baton.sim.report import SimReport
from baton.sim.simulator import simulate
from baton.sim.speed import Speed
from baton.sim.workload import from_trace

TARGETS = Targets(30.0, 0.1)
KV_BYTES = 327_680  # 80 layers, keys and values, 8 heads of 128, 2 bytes
KV_TOKENS = 1_000_000
WORKERS = 16
PROFILE = "splitwise:llama2-70b:a100-80gb:8"
POLICIES: tuple[PolicyName, ...] = ("prefix", "least-loaded")


def mooncake(
    name: str, path: Path | None, paper: str, prefills: Sequence[int], requests: int, halvings: int
) -> list[Figure]:
    """Capacity on one trace, with each number of `prefills`, of its first `requests` requests."""
    if path is None:
        return [Figure(f"mooncake_{name}_capacity_gain", None, "ratio", peer="the trace was not given")]
    everything = read_trace(path, "mooncake")
    rows = everything[:requests]
    layouts = {
        f"{count} prefill + {WORKERS - count} decode": (Role.PREFILL,) * count
        + (Role.DECODE,) * (WORKERS - count)
        for count in prefills
    }
    layouts[f"{WORKERS} hybrid"] = (Role.HYBRID,) * WORKERS
    speed = speed_of(PROFILE)
    table = Table(
        "layout", "placement", "capacity, requests/s", "hit %", "pulled %",
        title=f"{path.name}, {len(rows)} requests, {WORKERS} x 8 A100, Llama-2-70B",
    )  # fmt: skip
    best: dict[tuple[str, str], float] = {}
    for (layout, roles), policy in product(layouts.items(), POLICIES):
        cluster = SimCluster(
            tuple(worker(role, speed) for role in roles),
            block_tokens=MOONCAKE_BLOCK_TOKENS,
            kv_bytes_per_token=KV_BYTES,
            policy=policy,
        )
        capacity, report = _capacity(cluster, rows, halvings)
        kind = "colocated" if "hybrid" in layout else "disaggregated"
        best[kind, policy] = max(best.get((kind, policy), 0.0), capacity)
        table.add_row(layout, policy, f"{capacity:.2f}", *_shares(report))
    CONSOLE.print(table)
    one, apart = _caches(everything)
    CONSOLE.print(
        f"Of the whole trace, one cache of {WORKERS} x {KV_TOKENS / 1e6:g} M tokens would have "
        f"{100 * one:.1f} %, {WORKERS} caches that take turns {100 * apart:.1f} %.\n"
        f"Unlike the paper: Llama-2-70B by Splitwise's measurements, {KV_TOKENS // 1000} k tokens of KV per "
        "worker and no DRAM pool; 100 Gb/s per worker; the second target is the mean time per token (0.1 s), "
        "not the longest tenth; the first part of the trace, sped up; colocated workers compute prompts in "
        "chunks of 2048 beside decodes; caches are cold at the start.",
        highlight=False,
    )
    aware, blind = best["disaggregated", "prefix"], best["disaggregated", "least-loaded"]
    return [
        ratio(
            f"mooncake_{name}_capacity_over_colocated_load_only",
            aware,
            best["colocated", "least-loaded"],
            f"paper: {paper}",
        ),
        ratio(f"mooncake_{name}_capacity_prefix_aware_over_load_only", aware, blind, f"paper: {paper}"),
        ratio(f"mooncake_{name}_hits_of_one_cache_over_local_ones", one, apart, "paper: up to 2.36"),
    ]


def worker(role: Role, speed: Speed) -> WorkerSpec:
    """One worker of 8 GPUs."""
    return WorkerSpec(role, speed, kv_blocks=KV_TOKENS // MOONCAKE_BLOCK_TOKENS, gpus=8)


def _capacity(cluster: SimCluster, rows: Sequence[Row], halvings: int) -> tuple[float, SimReport | None]:
    """Requests per second at the highest speed of the trace that is still good, and the report there."""
    found: list[SimReport] = []

    def good(speed: float) -> bool:
        requests = from_trace(scaled(rows, 1.0, speed), MOONCAKE_BLOCK_TOKENS)
        report = simulate(cluster, requests, TARGETS)
        if (report.summary.attainment or 0.0) < GOOD:
            return False
        found.append(report)
        return True

    speed = highest(good, 0.5, halvings)
    span_s = max(1e-9, rows[-1].arrival_s)
    return len(rows) / span_s * speed, found[-1] if found else None


def _shares(report: SimReport | None) -> tuple[str, str]:
    if report is None:
        return "", ""
    pulled = report.pulled_tokens / max(1, report.prompt_tokens)
    return f"{100 * report.hit_rate:.1f}", f"{100 * pulled:.1f}"


def _caches(rows: Sequence[Row]) -> tuple[float, float]:
    """Hit rates of one cache as large as all pools, and of the pools when requests take turns at them."""
    requests = list(from_trace(rows, MOONCAKE_BLOCK_TOKENS))
    blocks = KV_TOKENS // MOONCAKE_BLOCK_TOKENS
    one = single_cache_hit_rate(requests, MOONCAKE_BLOCK_TOKENS, WORKERS * blocks)
    hits = 0.0
    for number in range(WORKERS):
        mine = requests[number::WORKERS]
        tokens = sum(request.prompt_tokens for request in mine)
        hits += tokens * single_cache_hit_rate(mine, MOONCAKE_BLOCK_TOKENS, blocks)
    return one, hits / sum(request.prompt_tokens for request in requests)
