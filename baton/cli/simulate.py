"""`baton simulate`: how would a cluster that is not there serve a workload?"""

from __future__ import annotations

import time
from typing import Any, get_args

import click
from rich.console import Console

from baton.bench.load import cut
from baton.bench.plan import Load
from baton.bench.result import Run, run_of
from baton.bench.summary import Targets
from baton.bench.trace import TraceRow
from baton.cli.load_options import POSITIVE, load_of, load_options, report_options, require, result_of, write
from baton.cli.sim_options import worker_options
from baton.config import BadSetting, PolicyName
from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.profiles import NAMES, speed_of
from baton.sim.report import SimReport
from baton.sim.simulator import simulate
from baton.sim.workload import from_trace


@click.command(name="simulate", short_help="Serve a workload on a cluster in virtual time.")
@click.option("--profile", required=True, help=f"step times of a worker: {NAMES}")
@click.option("--prefill", type=click.IntRange(min=0), default=0, help="prefill workers")
@click.option("--decode", type=click.IntRange(min=0), default=0, help="decode workers")
@click.option("--hybrid", type=click.IntRange(min=0), default=0, help="hybrid workers")
@click.option("--policy", type=click.Choice(get_args(PolicyName)), default="prefix", show_default=True)
@click.option(
    "--kv-tokens", type=click.IntRange(min=1), default=500_000, show_default=True, help="per worker"
)
@worker_options
@click.option("--gpus-per-worker", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--price-per-gpu-hour", type=POSITIVE, help="in any currency")
@click.option("--routers", type=click.IntRange(min=1), default=1, show_default=True)
@load_options
@report_options
def simulate_command(**given: Any) -> None:
    """Serve a workload on a cluster in virtual time, by the code that runs real ones.

    The load is given as to `baton bench`: made-up lengths at --request-rate, or a --trace.
    """
    try:
        if given["html"] is not None:
            require("matplotlib")
        load = load_of(given)
        if load.concurrency is not None:
            raise BadSetting("the simulator's load is an open loop: give --request-rate or a --trace")
        cluster = _cluster(given)
        runs = _simulate(load, cluster, given)
    except BadSetting as error:
        raise click.UsageError(error.message) from error
    write(result_of("simulate", given, runs), given["out"], given["html"])


def _cluster(given: dict[str, Any]) -> SimCluster:
    speed = speed_of(given["profile"])
    block = given["block_size"]
    counts = {Role.PREFILL: given["prefill"], Role.DECODE: given["decode"], Role.HYBRID: given["hybrid"]}
    roles = [role for role, count in counts.items() for _ in range(count)]
    if not any(role.decodes for role in roles):
        raise BadSetting("the cluster has no worker that decodes; give --hybrid, or --prefill and --decode")
    return SimCluster(
        workers=tuple(
            WorkerSpec(
                role,
                speed,
                kv_blocks=max(1, given["kv_tokens"] // block),
                max_batch_tokens=given["max_batch_tokens"] or speed.step_size(given["max_batch_requests"]),
                max_batch_requests=given["max_batch_requests"],
                network_bytes_per_s=given["network_bytes_per_s"],
                gpus=given["gpus_per_worker"],
            )
            for role in roles
        ),
        block_tokens=block,
        kv_bytes_per_token=given["kv_bytes_per_token"],
        policy=given["policy"],
        routers=given["routers"],
    )


def _simulate(load: Load, cluster: SimCluster, given: dict[str, Any]) -> list[Run]:
    console = Console(stderr=True)
    targets = Targets(given["slo_ttft"], given["slo_tpot"])
    trace: list[TraceRow] = load.rows()
    runs = []
    for rate in load.rates or (None,):
        words, rows = load.at(trace, rate)
        label = "simulated" if len(load.rates) < 2 else f"simulated @ {rate:g}/s"
        began_s = time.perf_counter()
        report = simulate(
            cluster,
            from_trace(cut(rows, load.requests, load.duration_s), cluster.block_tokens),
            targets,
            price_per_gpu_hour=given["price_per_gpu_hour"],
            seed=load.seed,
        )
        _say(console, label, report, time.perf_counter() - began_s)
        runs.append(run_of(label, words, rate, report.records, report.summary))
    return runs


def _say(console: Console, label: str, report: SimReport, took_s: float) -> None:
    busy = [100 * worker.utilization for worker in report.workers]
    console.print(
        f"{label}: {report.summary.requests} requests on {len(busy)} workers, {report.span_s:.1f} s in "
        f"{took_s:.1f} s; hit rate {100 * report.hit_rate:.1f} %, workers busy {sum(busy) / len(busy):.0f} % "
        f"(most {max(busy):.0f} %)",
        highlight=False,
        soft_wrap=True,
    )
