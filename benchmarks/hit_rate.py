"""Which share of prompt tokens the placement policies save from being computed, and how evenly they load.

    python benchmarks/hit_rate.py --trace conversation_trace.jsonl --trace synthetic_trace.jsonl [--quick]

The traces are Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release/traces); without `--trace` a short
excerpt from tests/data is replayed, too short to hold the goals to. The policies, pools and the prefix index
are the real ones; time is virtual. Eight workers, as hybrids and as 4 prefill + 4 decode, share
`--cache-tokens` of pool. Their speed is chosen so that the traces keep them about half busy: 7 k tokens/s
at 8 k-token prompts, 160 KB of KV per token, 12.5 GB/s between any two. Ties are broken by one seed; others
move a hit rate by up to a point.

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
from baton.config import PolicyName
from baton.routing import Curve, Role
from baton.sim.replay import Replayed, SimCluster, replay
from baton.sim.trace import BLOCK_TOKENS, TraceRequest, read_trace, single_cache_hit_rate

EXCERPT = Path(__file__).resolve().parent.parent / "tests" / "data" / "mooncake_conversation_excerpt.jsonl"
PREFILL_CURVE = Curve(((512, 0.075), (4096, 0.55), (16384, 2.4), (65536, 12.0), (131072, 30.0)))
DECODE_CURVE = Curve(((1, 0.020), (32, 0.030), (128, 0.050)))
KV_BYTES_PER_TOKEN = 160_000
READ_BYTES_PER_S = 12.5e9
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
        requests = read_trace(path.read_text().splitlines())[: arguments.requests]
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
    requests: list[TraceRequest],
    cache_tokens: int,
) -> list[Figure]:
    """Print the table of one trace on one layout; what its figures are."""
    blocks = cache_tokens // BLOCK_TOKENS
    cluster = SimCluster(
        roles=roles,
        blocks_per_worker=blocks // len(roles),
        prefill_curve=PREFILL_CURVE,
        decode_curve=DECODE_CURVE,
        block_bytes=BLOCK_TOKENS * KV_BYTES_PER_TOKEN,
        read_bytes_per_s=READ_BYTES_PER_S,
    )
    optimum = single_cache_hit_rate(requests, blocks)
    infinite = single_cache_hit_rate(requests, sum(len(request.chain) for request in requests))
    table = Table(
        "policy", "hit %", "pulled %", "busiest / mean", "TTFT p50 s", "p99 s", "busy %",
        title=f"{trace}, {len(requests)} requests on {layout}, {cache_tokens / 1e6:g} M tokens of pool: "
        f"optimum {100 * optimum:.1f} %, infinite {100 * infinite:.1f} %",
    )  # fmt: skip
    runs = {name: (name, cluster) for name in get_args(PolicyName)}
    runs["prefix, 2 routers"] = ("prefix", replace(cluster, routers=2))
    if Role.HYBRID in roles:
        runs["prefix, no pulls"] = ("prefix", replace(cluster, read_bytes_per_s=1.0))
    done: dict[str, Replayed] = {}
    for name, (policy, on) in runs.items():
        done[name] = replay(requests, policy, on)
        table.add_row(name, *_row(done[name]))
    Console(file=sys.stdout, width=110).print(table)
    one, two = done["prefix"], done["prefix, 2 routers"]
    where = f"{trace}_{layout.replace(' + ', '_').replace(' ', '_')}"
    gap, apart = 100 * (optimum - one.hit_rate), 100 * abs(one.hit_rate - two.hit_rate)
    return [
        Figure(f"{where}_below_optimum", round(gap, 2), "points", "<= 3", gap <= 3),
        Figure(
            f"{where}_busiest_over_mean", round(one.imbalance, 3), "ratio", "<= 1.15", one.imbalance <= 1.15
        ),
        Figure(f"{where}_two_routers_apart", round(apart, 2), "points", "<= 1", apart <= 1),
        Figure(
            f"{where}_two_routers_busiest_over_mean",
            round(two.imbalance, 3),
            "ratio",
            "<= 1.25",
            two.imbalance <= 1.25,
        ),
    ]


def _row(result: Replayed) -> list[str]:
    first = sorted(result.first_token_s)
    return [
        f"{100 * result.hit_rate:.1f}",
        f"{100 * result.pulled_tokens / max(1, result.prompt_tokens):.1f}",
        f"{result.imbalance:.3f}",
        f"{first[len(first) // 2]:.2f}",
        f"{first[len(first) * 99 // 100]:.2f}",
        f"{100 * result.utilization:.0f}",
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
