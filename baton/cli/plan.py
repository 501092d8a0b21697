"""`baton plan`: how many workers of each role does a workload need?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from baton.bench.load import cut
from baton.bench.summary import Targets
from baton.cli.files import file_to_write
from baton.cli.load_options import POSITIVE, load_of, load_options, slo_options
from baton.cli.sim_options import worker_options
from baton.cli.tables import print_table
from baton.config import BadSetting
from baton.planning.offers import Hardware, offer_of
from baton.planning.search import Candidate, Goal, NoPlan, find_plan
from baton.planning.values import helm_values, ratio
from baton.sim.cluster import SimCluster
from baton.sim.profiles import NAMES
from baton.sim.workload import SimRequest, from_trace

_COLUMNS = ("prefill", "decode", "ratio", "GPUs", "predicted", "simulated", "TTFT p90", "TPOT p90")


@click.command(short_help="Find the fewest GPUs that serve a workload in time.")
@click.option(
    "--profile", "profiles", multiple=True, required=True, metavar="NAME[@GPUS]",
    help=f"step times of a worker that may be had, and the GPUs it takes; several are alternatives: {NAMES}",
)  # fmt: skip
@slo_options
@click.option(
    "--attainment", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True,
    help="share of the requests that must meet both targets",
)  # fmt: skip
@click.option("--max-gpus", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--gpu-bytes", type=POSITIVE, default=80e9, show_default=True, help="memory of one GPU")
@click.option(
    "--weight-bytes", type=click.FloatRange(min=0), default=0.0, show_default=True, help="of the model"
)
@click.option(
    "--kv-tokens", type=click.IntRange(min=0), default=0,
    help="that a worker holds  [default: what the weights leave of nine tenths of its GPUs]",
)  # fmt: skip
@worker_options
@file_to_write("--values", "file for the plan as Helm values")
@load_options
def plan(**given: Any) -> None:
    """The fewest GPUs, and the prefill : decode ratio, that serve a workload in time.

    Every split of ever more GPUs is predicted by queues in milliseconds, and those that may do are
    simulated, until one does. The load is given as to `baton bench`: made-up lengths at --request-rate, or a
    --trace.
    """
    try:
        goal = _goal(given)
        hardware = _hardware(given)
        offers = [offer_of(name, hardware) for name in given["profiles"]]
        requests = _requests(given, hardware.block_tokens)
        like = SimCluster(
            (), block_tokens=hardware.block_tokens, kv_bytes_per_token=hardware.kv_bytes_per_token
        )
    except BadSetting as error:
        raise click.UsageError(error.message) from error
    console = Console(stderr=True, highlight=False)

    def tell(tried: Candidate) -> None:
        console.print(_said(tried), soft_wrap=True)

    try:
        found = find_plan(offers, requests, like, goal, tell)
    except NoPlan as error:
        raise click.ClickException(error.message) from error
    print_table(_COLUMNS, [_row(candidate) for candidate in (found.chosen, *found.rejected[::-1])])
    chosen = found.chosen
    click.echo(
        f"{chosen.fleet}: {chosen.fleet.gpus} GPUs, prefill : decode "
        f"{ratio(chosen.fleet.prefills, chosen.fleet.decoders)}"
    )
    path: Path | None = given["values"]
    if path is not None:
        path.write_text(helm_values(chosen, goal, shlex.join(["baton", *sys.argv[1:]])))
        click.echo(f"values: {path}")


def _goal(given: dict[str, Any]) -> Goal:
    targets = Targets(given["slo_ttft"], given["slo_tpot"])
    if targets == Targets():
        raise BadSetting("say what is in time: --slo-ttft, --slo-tpot, or both")
    return Goal(targets, given["attainment"], given["max_gpus"])


def _hardware(given: dict[str, Any]) -> Hardware:
    return Hardware(
        gpu_bytes=given["gpu_bytes"],
        weight_bytes=given["weight_bytes"],
        kv_bytes_per_token=given["kv_bytes_per_token"],
        block_tokens=given["block_size"],
        kv_tokens=given["kv_tokens"],
        max_batch_tokens=given["max_batch_tokens"],
        max_batch_requests=given["max_batch_requests"],
        network_bytes_per_s=given["network_bytes_per_s"],
    )


def _requests(given: dict[str, Any], block_tokens: int) -> list[SimRequest]:
    load = load_of(given)
    if load.concurrency is not None or len(load.rates) > 1:
        raise BadSetting("a plan is for one open loop: give one --request-rate, or a --trace")
    _, rows = load.at(load.rows(), load.rates[0] if load.rates else None)
    return list(from_trace(cut(rows, load.requests, load.duration_s), block_tokens))


def _said(tried: Candidate) -> str:
    return (
        f"{tried.fleet}: {tried.fleet.gpus} GPUs, {tried.predicted.attainment:.1%} predicted, "
        f"{tried.attainment:.1%} simulated"
    )


def _row(tried: Candidate) -> list[str]:
    fleet = tried.fleet
    summary = None if tried.simulated is None else tried.simulated.summary
    latencies = [] if summary is None else [summary.ttft, summary.tpot]
    known = [None if latency is None else latency.p90 for latency in latencies]
    return [
        f"{fleet.prefills} x {fleet.prefill.name}",
        f"{fleet.decoders} x {fleet.decode.name}",
        ratio(fleet.prefills, fleet.decoders),
        str(fleet.gpus),
        f"{tried.predicted.attainment:.1%}",
        f"{tried.attainment:.1%}",
        *("" if value is None else f"{value:.3f} s" for value in known),
    ]
