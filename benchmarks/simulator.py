"""What the simulator says of published results, and how large a cluster it can simulate.

    python benchmarks/simulator.py [--quick] [--conversation FILE] [--synthetic FILE] [--azure FILE]

The traces are Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release/traces) and Azure's
(github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv); what needs a trace that is not given
is left out, with `null` and the reason. Time is virtual; policies, schedulers and pools are the real ones.

- DistServe's and Mooncake's results: see `simulator_distserve.py` and `simulator_mooncake.py`. What differs
  from the papers is printed with each table.
- Scale: CPU seconds and memory for clusters of 10, 100 and 1000 workers.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from simulator_distserve import distserve
from simulator_mooncake import KV_BYTES, mooncake, worker
from simulator_search import CONSOLE, Figure

from baton import __version__
from baton.bench.load import Synthetic, cut, timed
from baton.bench.summary import Targets
from baton.bench.trace import MOONCAKE_BLOCK_TOKENS, TraceRow, read_trace
from baton.routing import Role
from baton.sim.cluster import SimCluster
from baton.sim.profiles import speed_of
from baton.sim.simulator import simulate
from baton.sim.workload import from_trace

PARTS = ("distserve", "mooncake", "scale")


def main() -> None:
    arguments = _arguments()
    figures: list[Figure] = []
    if "distserve" in arguments.part:
        degrees = (1, 2) if arguments.quick else (1, 2, 4)
        for load in distserve_loads(arguments):
            figures += distserve(*load, degrees, arguments.halvings, best=1 if arguments.quick else 4)
    if "mooncake" in arguments.part:
        prefills = (4, 8) if arguments.quick else (2, 3, 4, 6, 8)
        searched = prefills, arguments.requests, arguments.halvings
        figures += mooncake("conversation", arguments.conversation, "+59 % to +498 %", *searched)
        figures += mooncake("synthetic", arguments.synthetic, "+40 %", *searched)
    if "scale" in arguments.part:
        sizes = {10: 2000, 100: 2000, 1000: 5000 if arguments.quick else arguments.scale_requests}
        for workers, requests in sizes.items():
            figures += scale(workers, requests)
    report = {
        "benchmark": "simulator",
        "device": f"virtual; {platform.machine()}",
        "versions": {"baton": __version__, "python": platform.python_version()},
        "figures": [vars(figure) for figure in figures],
    }
    print(json.dumps(report))


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


def scale(workers: int, requests: int) -> Sequence[Figure]:
    """A cluster of which half prefills and half decodes, about half busy."""
    spec = worker(Role.PREFILL, speed_of("splitwise:llama2-70b:h100-80gb:8"))
    half = workers // 2
    cluster = SimCluster(
        (spec,) * half + (replace(spec, role=Role.DECODE),) * (workers - half),
        block_tokens=MOONCAKE_BLOCK_TOKENS,
        kv_bytes_per_token=KV_BYTES,
        routers=4,
    )
    rows = timed(Synthetic(1155, 211, spread=0.9).rows(Random(3)), "poisson", 3.0 * workers, Random(4))
    began_s = time.process_time()
    asked = from_trace(cut(rows, requests, None), MOONCAKE_BLOCK_TOKENS)
    report = simulate(cluster, asked, Targets(1.0, 0.1))
    took_s = time.process_time() - began_s
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    busy = sum(each.utilization for each in report.workers) / len(report.workers)
    CONSOLE.print(
        f"{workers} workers, {requests} requests of 1155 tokens in and 211 out on average, "
        f"{100 * busy:.0f} % busy: {report.span_s:.0f} s in {took_s:.0f} s of CPU, {requests / took_s:.0f} "
        f"requests/s, {report.events / 1e6:.1f} M events, {peak_gb:.2f} GB",
        highlight=False,
    )
    return [
        Figure(f"scale_{workers}_workers", round(requests / took_s), "requests per s of CPU"),
        Figure(f"scale_{workers}_workers_{requests}_requests", round(took_s, 1), "s of CPU"),
        Figure(f"scale_{workers}_workers_memory", round(peak_gb, 2), "GB", "< 8", peak_gb < 8),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversation", type=Path, help="Mooncake's conversation trace")
    parser.add_argument("--synthetic", type=Path, help="Mooncake's synthetic trace")
    parser.add_argument("--azure", type=Path, help="Azure's conversation trace, for lengths")
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated [all]")
    parser.add_argument("--requests", type=int, default=1500, help="of each trace [1500]")
    parser.add_argument("--scale-requests", type=int, default=1_000_000, help="on 1000 workers [1 000 000]")
    parser.add_argument("--quick", action="store_true", help="fewer requests, layouts and steps")
    arguments = parser.parse_args()
    arguments.part = arguments.part or PARTS
    arguments.halvings = 2 if arguments.quick else 4
    if arguments.quick:
        arguments.requests = min(arguments.requests, 400)
    return arguments


if __name__ == "__main__":
    main()
