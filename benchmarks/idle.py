"""Does a cluster that nobody has used for a while answer the next request as fast as the one before?

    python benchmarks/idle.py [--quick] [--minutes 10]

`baton up` runs a prefill and a decode worker with the bundled model. After a few requests it is left alone:
nothing but keepalives goes over its connections, and over the gRPC connection of a client that stays. Then
come the first request by HTTP and the first on that gRPC connection, and some more. What its processes used
of the processor meanwhile is printed too.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table
from served import cpu_seconds, figure, print_report, random_tokens, stream

from baton.rpc.channels import open_channel
from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster import Cluster, run_cluster

PROMPT_TOKENS, OUTPUT_TOKENS = 200, 16
REQUESTS = 20


@dataclass(frozen=True)
class Found:
    """Seconds to the first token: of requests before, by HTTP and gRPC, of the first two afterwards, and of
    those by HTTP after them; seconds of processor time that each process used per minute meanwhile."""

    http_before_s: list[float]
    grpc_before_s: list[float]
    first_http_s: float
    first_grpc_s: float
    after_s: list[float]
    cpu_s_per_minute: dict[str, float]


async def over_http(cluster: Cluster, draw: random.Random) -> float:
    return (await stream(cluster.base_url, random_tokens(PROMPT_TOKENS, draw), OUTPUT_TOKENS)).ttft_s


async def over_grpc(channel: grpc.aio.Channel, draw: random.Random) -> float:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=random_tokens(PROMPT_TOKENS, draw)),
        sampling=inference_pb2.SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True),
    )
    began_s = time.monotonic()
    first_s = 0.0
    async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60):
        first_s = first_s or time.monotonic() - began_s
    return first_s


async def measure(cluster: Cluster, minutes: float) -> Found:
    draw = random.Random(3)
    async with open_channel(cluster.grpc_address) as channel:
        for _ in range(3):
            await over_http(cluster, draw)
            await over_grpc(channel, draw)
        http_before_s = [await over_http(cluster, draw) for _ in range(REQUESTS)]
        grpc_before_s = [await over_grpc(channel, draw) for _ in range(REQUESTS)]
        pids = cluster.pids()
        used = {name: cpu_seconds(pid) for name, pid in pids.items()}
        await asyncio.sleep(60 * minutes)
        per_minute = {name: (cpu_seconds(pid) - used[name]) / minutes for name, pid in pids.items()}
        first_http_s, first_grpc_s = await over_http(cluster, draw), await over_grpc(channel, draw)
        after_s = [await over_http(cluster, draw) for _ in range(REQUESTS)]
    return Found(http_before_s, grpc_before_s, first_http_s, first_grpc_s, after_s, per_minute)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half a minute, three rounds of keepalives")
    parser.add_argument("--minutes", type=float, default=10.0, help="for how long nobody asks anything")
    given = parser.parse_args()
    minutes = 0.5 if given.quick else given.minutes
    with tempfile.TemporaryDirectory() as folder, run_cluster(Path(folder)) as cluster:
        found = asyncio.run(measure(cluster, minutes))
    usual_s = statistics.median(found.http_before_s)
    http_s, grpc_s = max(found.http_before_s), max(found.grpc_before_s)
    table = Table(title=f"Time to the first token of {PROMPT_TOKENS}, around {minutes:g} idle minutes")
    table.add_column("request")
    table.add_column("ms", justify="right")
    for name, value_s in (
        ("by HTTP before, median", usual_s),
        ("by HTTP before, slowest", http_s),
        ("by gRPC before, slowest", grpc_s),
        ("the first by HTTP", found.first_http_s),
        ("the first on an idle gRPC connection", found.first_grpc_s),
        ("after, median", statistics.median(found.after_s)),
    ):
        table.add_row(name, f"{1e3 * value_s:.1f}")
    Console(file=sys.stdout, width=110).print(table)
    for name, seconds in found.cpu_s_per_minute.items():
        print(f"{name} used {seconds:.2f} s of processor time per idle minute")
    print_report(
        "idle",
        [
            figure("idle_minutes", minutes, "min"),
            figure("first_http_to_slowest_before", found.first_http_s / http_s, "ratio", at_most=1.5),
            figure("first_grpc_to_slowest_before", found.first_grpc_s / grpc_s, "ratio", at_most=1.5),
            figure(
                "median_after_to_before", statistics.median(found.after_s) / usual_s, "ratio", at_most=1.2
            ),
            figure("idle_cpu_all_processes", sum(found.cpu_s_per_minute.values()) / 60, "cores"),
        ],
    )


if __name__ == "__main__":
    main()
