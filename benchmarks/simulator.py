"""What the simulator says of published results, and how large a cluster it can simulate.

    python benchmarks/simulator.py [--quick] [--conversation FILE] [--synthetic FILE] [--azure FILE]

The traces are Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release/traces) and Azure's
(github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv); what needs a trace that is not given
is left out, with `null` and the reason. Time is virtual; policies, schedulers and pools are the real ones.

- DistServe (OSDI 2024): the highest rate per GPU at which 90 % of requests meet both targets.
- Mooncake (FAST 2025): the highest speed of its traces at which 90 % of requests meet both targets, for
  divisions of 16 workers and for prefix-aware against load-only placement; and prompt tokens found cached.
- Scale: wall seconds and memory for a large cluster. Placement weighs 8 drawn workers of each role.

What differs from the papers is printed with each table.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from baton import __version__
from baton.bench.load import Synthetic, cut, scaled, timed
from baton.bench.summary import Targets
from baton.bench.trace import TraceRow, read_trace
from baton.config import PolicyName
from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.profiles import speed_of
from baton.sim.report import SimReport
from baton.sim.simulator import simulate
from baton.sim.speed import Speed
from baton.sim.workload import from_trace

GOOD = 0.9
OPT_KV_BYTES = 819_200  # 40 layers, keys and values, 5120 wide, 2 bytes
OPT_WEIGHT_BYTES = 26e9
GPU_BYTES = 80e9
DISTSERVE = Targets(0.2, 0.1)
DISTSERVE_PAPER = 1.56
MOONCAKE = Targets(30.0, 0.1)
LLAMA_KV_BYTES = 327_680  # 80 layers, keys and values, 8 heads of 128, 2 bytes
LLAMA_KV_TOKENS = 1_000_000
MOONCAKE_BLOCK = 512
WORKERS = 16
CONSOLE = Console(width=110)


@dataclass(frozen=True)
class Figure:
    """One line of the report that tools read."""

    figure: str
    value: float | None
    unit: str
    goal: str = ""
    met: bool | None = None
    peer: str = ""


def highest(good: Callable[[float], bool], low: float, steps: int) -> float:
    """The highest value that is good: doubled from `low`, then narrowed by halves; 0 when `low` is not."""
    if not good(low):
        return 0.0
    high = 2 * low
    while good(high):
        low, high = high, 2 * high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


# ---- DistServe ------------------------------------------------------------------------------------


def distserve(name: str, source: str, rows: Sequence[TraceRow], halvings: int) -> list[Figure]:
    """Goodput per GPU of OPT-13B, colocated and disaggregated."""

    def opt(role: Role, degree: int, budget: int) -> WorkerSpec:
        kv_bytes = 0.9 * GPU_BYTES * degree - OPT_WEIGHT_BYTES
        return WorkerSpec(
            role,
            speed_of(f"distserve:opt-13b:{degree}"),
            kv_blocks=int(kv_bytes / OPT_KV_BYTES / 16),
            max_batch_tokens=budget,
            network_bytes_per_s=100e9,
            gpus=degree,
        )

    layouts = {
        f"colocated, TP{degree}, {budget} tokens a step": (opt(Role.HYBRID, degree, budget),)
        for degree, budget in product((1, 2), (512, 2048))
    }
    for prefills, degree, decodes in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2)):
        prefill = (opt(Role.PREFILL, degree, 2048),) * prefills
        decode = (opt(Role.DECODE, 1, 2048),) * decodes
        layouts[f"{prefills} prefill TP{degree} + {decodes} decode TP1"] = prefill + decode
    table = Table("layout", "GPUs", "goodput, requests/s per GPU", title=f"OPT-13B on A100-80G, {source}")
    best = {"colocated": 0.0, "disaggregated": 0.0}
    for name, workers in layouts.items():
        cluster = SimCluster(workers, kv_bytes_per_token=OPT_KV_BYTES)

        def good(rate: float, cluster: SimCluster = cluster) -> bool:
            arriving = timed(rows, "poisson", rate * cluster.gpus, Random(2))
            report = simulate(cluster, from_trace(arriving, 16), DISTSERVE)
            return (report.summary.attainment or 0.0) >= GOOD

        rate = highest(good, 0.1, halvings)
        table.add_row(name, str(cluster.gpus), f"{rate:.2f}")
        kind = "colocated" if name.startswith("colocated") else "disaggregated"
        best[kind] = max(best[kind], rate)
    CONSOLE.print(table)
    CONSOLE.print(
        "Unlike the paper: the lengths; colocated workers compute prompts in chunks beside decodes (the "
        "paper's vLLM did not); one worker of each kind; KV moves at 100 GB/s per GPU pair; 90 % of 80 GB.",
        highlight=False,
    )
    ratio = best["disaggregated"] / best["colocated"] if best["colocated"] else None
    return [
        Figure(f"distserve_{name}_colocated_goodput_per_gpu", round(best["colocated"], 2), "requests/s"),
        Figure(
            f"distserve_{name}_disaggregated_goodput_per_gpu",
            round(best["disaggregated"], 2),
            "requests/s",
            peer=f"DistServe's simulator on ShareGPT: {DISTSERVE_PAPER}",
        ),
        Figure(
            f"distserve_{name}_disaggregated_over_colocated",
            ratio and round(ratio, 2),
            "ratio",
            "> 1",
            (ratio or 0) > 1,
        ),
    ]


def distserve_loads(arguments: argparse.Namespace) -> list[tuple[str, str, list[TraceRow]]]:
    """Name, description and requests of each load there is."""
    made = Synthetic(755, 200, spread=0.5).rows(Random(1))
    source = "made-up lengths with the means of ShareGPT in the paper, 755 in and 200 out, +-50 %"
    loads = [("sharegpt_means", source, cut(made, arguments.requests, None))]
    if arguments.azure is not None:
        rows = read_trace(arguments.azure, "azure")
        fitting = [row for row in rows if row.input_tokens + row.output_tokens <= 2048]
        source = f"lengths of {arguments.azure.name} that fit OPT's context of 2048"
        loads.append(("azure", source, fitting[: arguments.requests]))
    return loads


# ---- Mooncake -------------------------------------------------------------------------------------


def mooncake(name: str, path: Path | None, paper: str, arguments: argparse.Namespace) -> list[Figure]:
    """Effective request capacity on one of Mooncake's traces."""
    if path is None:
        return [Figure(f"mooncake_{name}_capacity_gain", None, "ratio", peer="the trace was not given")]
    rows = read_trace(path, "mooncake")[: arguments.requests]
    layouts: dict[str, tuple[Role, ...]] = {
        f"{count} prefill + {WORKERS - count} decode": (Role.PREFILL,) * count
        + (Role.DECODE,) * (WORKERS - count)
        for count in ((8, 12) if arguments.quick else (6, 8, 10, 12, 13))
    }
    layouts[f"{WORKERS} hybrid"] = (Role.HYBRID,) * WORKERS
    speed = speed_of("splitwise:llama2-70b:a100-80gb:8")
    table = Table(
        "layout", "placement", "capacity, requests/s", "hit %", "pulled %",
        title=f"{path.name}, {len(rows)} requests, {WORKERS} x 8 A100, Llama-2-70B",
    )  # fmt: skip
    best: dict[tuple[str, str], float] = {}
    hits: dict[str, float] = {}
    policies: tuple[PolicyName, ...] = ("prefix", "least-loaded")
    for (layout, roles), policy in product(layouts.items(), policies):
        cluster = SimCluster(
            tuple(_llama(role, speed) for role in roles),
            block_tokens=MOONCAKE_BLOCK,
            kv_bytes_per_token=LLAMA_KV_BYTES,
            policy=policy,
        )
        capacity, report = _capacity(cluster, rows, arguments.halvings)
        kind = "colocated" if "hybrid" in layout else "disaggregated"
        best[kind, policy] = max(best.get((kind, policy), 0.0), capacity)
        if report is not None and kind == "disaggregated":
            hits[policy] = max(hits.get(policy, 0.0), report.hit_rate)
        hit = "" if report is None else f"{100 * report.hit_rate:.1f}"
        pulled = "" if report is None else f"{100 * report.pulled_tokens / max(1, report.prompt_tokens):.1f}"
        table.add_row(layout, policy, f"{capacity:.2f}", hit, pulled)
    CONSOLE.print(table)
    CONSOLE.print(
        f"Unlike the paper: Llama-2-70B by Splitwise's measurements, {LLAMA_KV_TOKENS // 1000} k tokens "
        "of KV per worker and no DRAM pool; 100 Gb/s per worker; the second target is the mean time per "
        "token (0.1 s), not the longest tenth; the first part of the trace, sped up; colocated workers "
        "compute prompts in chunks of 2048 beside decodes; caches are cold at the start.",
        highlight=False,
    )
    aware, colocated = best["disaggregated", "prefix"], best["colocated", "least-loaded"]
    blind = best["disaggregated", "least-loaded"]
    return [
        _ratio(f"mooncake_{name}_capacity_over_colocated_load_only", aware, colocated, paper),
        _ratio(f"mooncake_{name}_capacity_prefix_aware_over_load_only", aware, blind, paper),
        _ratio(
            f"mooncake_{name}_hits_prefix_aware_over_load_only",
            hits.get("prefix", 0.0),
            hits.get("least-loaded", 0.0),
            "global over local cache, up to 2.36",
        ),
    ]


def _llama(role: Role, speed: Speed) -> WorkerSpec:
    return WorkerSpec(
        role,
        speed,
        kv_blocks=LLAMA_KV_TOKENS // MOONCAKE_BLOCK,
        network_bytes_per_s=12.5e9,
        gpus=8,
    )


def _capacity(cluster: SimCluster, rows: Sequence[TraceRow], halvings: int) -> tuple[float, SimReport | None]:
    """Requests per second at the highest speed of the trace that is still good, and the report there."""
    found: list[SimReport] = []

    def good(speed: float) -> bool:
        report = simulate(cluster, from_trace(scaled(rows, 1.0, speed), MOONCAKE_BLOCK), MOONCAKE)
        if (report.summary.attainment or 0.0) < GOOD:
            return False
        found.append(report)
        return True

    speed = highest(good, 0.125, halvings)
    span_s = max(1e-9, rows[-1].arrival_s)
    return len(rows) / span_s * speed, found[-1] if found else None


def _ratio(figure: str, over: float, under: float, paper: str) -> Figure:
    value = round(over / under, 2) if under else None
    return Figure(figure, value, "ratio", "> 1", value is not None and value > 1, f"paper: {paper}")


# ---- scale ----------------------------------------------------------------------------------------


def scale(arguments: argparse.Namespace) -> list[Figure]:
    """One large cluster: half its workers prefill, half decode, about half busy."""
    workers, requests = (100, 5_000) if arguments.quick else (arguments.workers, arguments.scale_requests)
    speed = speed_of("splitwise:llama2-70b:h100-80gb:8")
    spec = WorkerSpec(Role.PREFILL, speed, kv_blocks=LLAMA_KV_TOKENS // MOONCAKE_BLOCK, gpus=8)
    half = workers // 2
    cluster = SimCluster(
        (spec,) * half + (replace(spec, role=Role.DECODE),) * (workers - half),
        block_tokens=MOONCAKE_BLOCK,
        kv_bytes_per_token=LLAMA_KV_BYTES,
        routers=4,
    )
    rows = timed(Synthetic(1155, 211, spread=0.9).rows(Random(3)), "poisson", 3.0 * workers, Random(4))
    began_s = time.perf_counter()
    report = simulate(cluster, from_trace(cut(rows, requests, None), MOONCAKE_BLOCK), Targets(1.0, 0.1))
    took_s = time.perf_counter() - began_s
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    busy = sum(worker.utilization for worker in report.workers) / len(report.workers)
    CONSOLE.print(
        f"{workers} workers, {requests} requests of 1155 tokens in and 211 out on average, "
        f"{100 * busy:.0f} % busy: {report.span_s:.0f} s in {took_s:.0f} s, "
        f"{report.events / 1e6:.1f} M events, {peak_gb:.2f} GB",
        highlight=False,
    )
    return [
        Figure(f"scale_{workers}_workers_{requests}_requests", round(took_s, 1), "s"),
        Figure("scale_requests_per_s", round(requests / took_s), "requests/s"),
        Figure("scale_memory", round(peak_gb, 2), "GB", "< 8", peak_gb < 8),
    ]


def main() -> None:
    arguments = _arguments()
    figures = [
        *(figure for load in distserve_loads(arguments) for figure in distserve(*load, arguments.halvings)),
        *mooncake("conversation", arguments.conversation, "+59 % to +498 %", arguments),
        *mooncake("synthetic", arguments.synthetic, "+40 %", arguments),
        *scale(arguments),
    ]
    report = {
        "benchmark": "simulator",
        "device": f"virtual; {platform.machine()}",
        "versions": {"baton": __version__, "python": platform.python_version()},
        "figures": [vars(figure) for figure in figures],
    }
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversation", type=Path, help="Mooncake's conversation trace")
    parser.add_argument("--synthetic", type=Path, help="Mooncake's synthetic trace")
    parser.add_argument("--azure", type=Path, help="Azure's conversation trace, for lengths")
    parser.add_argument("--requests", type=int, default=1500, help="of each trace [1500]")
    parser.add_argument("--workers", type=int, default=1000, help="of the large cluster [1000]")
    parser.add_argument("--scale-requests", type=int, default=1_000_000, help="on it [1 000 000]")
    parser.add_argument("--quick", action="store_true", help="fewer requests, layouts and steps")
    arguments = parser.parse_args()
    arguments.halvings = 2 if arguments.quick else 4
    if arguments.quick:
        arguments.requests = min(arguments.requests, 250)
    return arguments


if __name__ == "__main__":
    main()
