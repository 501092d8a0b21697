"""Which share of prompt tokens the placement policies save from being computed, and how evenly they load.

    python benchmarks/hit_rate.py --trace conversation_trace.jsonl --trace synthetic_trace.jsonl [--quick]

The traces are Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release/traces); without `--trace` a short
excerpt from tests/data is replayed, too short to hold the goals to. The policies, schedulers, pools and the
prefix index are the real ones; time is virtual (`baton.sim`). Eight workers, as hybrids and as 4 prefill + 4
decode, share `--cache-tokens` of pool. They compute 7 k tokens/s of 8 k-token prompts; KV takes 160 KB per
token, and moves at 12.5 GB/s between any two. Ties are broken by one seed; others move a hit rate by up to a
point.

- hit: prompt tokens whose KV was at hand in the worker's pool or, pulled, in another's
- optimum: the same for one LRU cache of the size of all pools together, serving one request at a time.
- busiest: the most loaded worker's seconds over the mean of its role's

`prefix, 2 routers` are two that take turns, see each other's reservations 10 ms later and workers' reports
5 ms later. `prefix, no pulls` reads nothing from other workers.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from baton import __version__
from baton.bench.trace import MOONCAKE_BLOCK_TOKENS, read_trace
from baton.config import PolicyName
from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.optimum import single_cache_hit_rate
from baton.sim.report import SimReport
from baton.sim.simulator import simulate
from baton.sim.speed import TableSpeed
from baton.sim.workload import SimRequest, from_trace

EXCERPT = Path(__file__).resolve().parent.parent / "tests" / "data" / "mooncake_conversation_excerpt.jsonl"
SPEED = TableSpeed(
    {512: 0.075, 4096: 0.55, 16384: 2.4, 65536: 12.0, 131072: 30.0},
    {(1, 512): 0.020, (32, 512): 0.030, (128, 512): 0.050},
)
KV_BYTES_PER_TOKEN = 160_000
STEP_TOKENS = 8192
NETWORK_S = 0.005
LAYOUTS = {
    "8 hybrid": (Role.HYBRID,) * 8,
    "4 prefill + 4 decode": (Role.PREFILL,) * 4 + (Role.DECODE,) * 4,
}
QUICK_REQUESTS = 1200
QUICK_CACHE_TOKENS = 3_000_000


@dataclass(frozen=True)
class Figure:
    """One line of the report that tools read."""

    figure: str
    value: float
    unit: str
    goal: str
    met: bool


def main() -> None:
    arguments = _arguments()
    figures: list[Figure] = []
    for path in arguments.trace:
        rows = read_trace(path, "mooncake")[: arguments.requests]
        requests = list(from_trace(rows, MOONCAKE_BLOCK_TOKENS))
        for layout, roles in LAYOUTS.items():
            figures += measure(path.stem, layout, roles, requests, arguments.cache_tokens)
    report = {
        "benchmark": "hit_rate",
        "device": f"virtual; {platform.machine()}",
        "versions": {"baton": __version__, "python": platform.python_version()},
        "requests": arguments.requests,
        "cache_tokens": arguments.cache_tokens,
        "figures": [vars(figure) for figure in figures],
    }
    print(json.dumps(report))


def measure(
    trace: str,
    layout: str,
    roles: tuple[Role, ...],
    requests: list[SimRequest],
    cache_tokens: int,
) -> list[Figure]:
    """Print the table of one trace on one layout; what its figures are."""
    blocks = cache_tokens // MOONCAKE_BLOCK_TOKENS
    workers = tuple(
        WorkerSpec(role, SPEED, blocks // len(roles), STEP_TOKENS, max_waiting=len(requests))
        for role in roles
    )
    cluster = SimCluster(
        workers, MOONCAKE_BLOCK_TOKENS, kv_bytes_per_token=KV_BYTES_PER_TOKEN, network_s=NETWORK_S
    )
    unable = replace(cluster, workers=tuple(replace(worker, network_bytes_per_s=1.0) for worker in workers))
    optimum = single_cache_hit_rate(requests, MOONCAKE_BLOCK_TOKENS, blocks)
    everything = sum(len(request.chain) for request in requests)
    infinite = single_cache_hit_rate(requests, MOONCAKE_BLOCK_TOKENS, everything)
    table = Table(
        "policy", "hit %", "pulled %", "busiest / mean", "TTFT p50 s", "p99 s", "busy %",
        title=f"{trace}, {len(requests)} requests on {layout}, {cache_tokens / 1e6:g} M tokens of pool: "
        f"optimum {100 * optimum:.1f} %, infinite {100 * infinite:.1f} %",
    )  # fmt: skip
    runs = {name: replace(cluster, policy=name) for name in get_args(PolicyName)}
    runs["prefix, 2 routers"] = replace(cluster, routers=2)
    if Role.HYBRID in roles:
        runs["prefix, no pulls"] = unable
    done: dict[str, SimReport] = {}
    for name, on in runs.items():
        done[name] = simulate(on, requests)
        table.add_row(name, *_row(done[name]))
    Console(file=sys.stdout, width=110).print(table)
    one, two = done["prefix"], done["prefix, 2 routers"]
    where = f"{trace}_{layout.replace(' + ', '_').replace(' ', '_')}"
    uneven = [max(report.imbalance(role) for role in roles) for report in (one, two)]
    gap, apart = 100 * (optimum - one.hit_rate), 100 * abs(one.hit_rate - two.hit_rate)
    return [
        Figure(f"{where}_below_optimum", round(gap, 2), "points", "<= 3", gap <= 3),
        Figure(f"{where}_busiest_over_mean", round(uneven[0], 3), "ratio", "<= 1.15", uneven[0] <= 1.15),
        Figure(f"{where}_two_routers_apart", round(apart, 2), "points", "<= 1", apart <= 1),
        Figure(
            f"{where}_two_routers_busiest_over_mean",
            round(uneven[1], 3),
            "ratio",
            "<= 1.25",
            uneven[1] <= 1.25,
        ),
    ]


def _row(report: SimReport) -> list[str]:
    first, workers = report.summary.ttft, report.workers
    uneven = max(report.imbalance(role) for role in {worker.role for worker in workers})
    busy = sum(worker.utilization for worker in workers) / len(workers)
    return [
        f"{100 * report.hit_rate:.1f}",
        f"{100 * report.pulled_tokens / max(1, report.prompt_tokens):.1f}",
        f"{uneven:.3f}",
        "failed" if first is None or first.p50 is None else f"{first.p50:.2f}",
        "failed" if first is None or first.p99 is None else f"{first.p99:.2f}",
        f"{100 * busy:.0f}",
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, action="append", help="a Mooncake trace; may be repeated")
    parser.add_argument("--requests", type=int, help="replay so many of each trace at most [all]")
    parser.add_argument("--cache-tokens", type=int, help="KV of all pools together [12 000 000]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_REQUESTS} requests of each trace, {QUICK_CACHE_TOKENS} tokens of pool",
    )
    arguments = parser.parse_args()
    arguments.trace = arguments.trace or [EXCERPT]
    if arguments.quick:
        arguments.requests = arguments.requests or QUICK_REQUESTS
        arguments.cache_tokens = arguments.cache_tokens or QUICK_CACHE_TOKENS
    arguments.cache_tokens = arguments.cache_tokens or 12_000_000
    return arguments


if __name__ == "__main__":
    main()
