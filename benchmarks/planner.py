"""Plans for recorded workloads against the simulator, and a day under the planner against fixed ratios.

    python benchmarks/planner.py [--quick] [--code FILE] [--conversation FILE] [--brute-force] [--plot FILE]

- Plans: the fewest GPUs for Azure's traces (github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_code
  and _conv) by DistServe's measurements of OPT-13B on A100, on one GPU or two. How far the prediction is
  from the simulator; with --brute-force every fleet with a GPU or two fewer is simulated: would one do? If
  one of still fewer did, one of these would, which has its workers and some more.
- Day: 24 hours of --hour-s seconds each, with a burst of five times the load and, at noon, a shift from long
  prompts to long answers, on a budget of 8 GPUs: every fixed ratio, the planner without flips (workers go and
  others take --start-s to come), and the planner.

Time is virtual; policies, schedulers, pools and the planner's controller are the real ones.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from baton import __version__
from baton.bench.summary import Targets
from baton.bench.trace import TraceRow, read_trace
from baton.planning.controller import Aims, Controller
from baton.planning.fleet import Fleet, Offer
from baton.planning.offers import Hardware, offer_of
from baton.planning.search import Goal, find_plan
from baton.planning.simulated import SimulatedPlanner
from baton.planning.values import ratio
from baton.routing import Role
from baton.sim.cluster import SimCluster
from baton.sim.simulator import SimReport, simulate
from baton.sim.workload import SimRequest, from_trace

OPT = Hardware(gpu_bytes=80e9, weight_bytes=26e9, kv_bytes_per_token=819_200, block_tokens=64)
LIKE = SimCluster((), block_tokens=OPT.block_tokens, kv_bytes_per_token=OPT.kv_bytes_per_token)
TARGETS = Targets(1.0, 0.1)
GOOD = 0.9
BUDGET = 8
INTERVAL_S = 5.0
CONSOLE = Console(width=110, highlight=False)


@dataclass(frozen=True)
class Figure:
    """One line of the report that tools read."""

    figure: str
    value: float | None
    unit: str
    goal: str = ""
    met: bool | None = None
    peer: str = ""


# ---- plans ----------------------------------------------------------------------------------------


def plans(name: str, path: Path | None, arguments: argparse.Namespace) -> list[Figure]:
    """GPUs and ratio for a trace at its own rate."""
    if path is None:
        return [Figure(f"plan_{name}_gpus", None, "GPUs", peer="the trace was not given")]
    rows = read_trace(path, "azure")[: arguments.requests]
    requests = list(from_trace(rows, OPT.block_tokens))
    offers = [offer_of(f"distserve:opt-13b:{degree}", OPT) for degree in (1, 2)]
    goal = Goal(TARGETS, GOOD)
    plan = find_plan(offers, requests, LIKE, goal)
    table = Table(
        *("fleet", "GPUs", "ratio", "predicted", "simulated"),
        title=f"{path.name}, {len(rows)} requests at {len(rows) / rows[-1].arrival_s:.1f}/s, OPT-13B",
    )
    for tried in (plan.chosen, *plan.rejected[::-1]):
        fleet = tried.fleet
        table.add_row(
            str(fleet),
            str(fleet.gpus),
            ratio(fleet.prefills, fleet.decoders),
            f"{tried.predicted.attainment:.1%}",
            f"{tried.attainment:.1%}",
        )
    CONSOLE.print(table)
    chosen = plan.chosen
    error = abs(chosen.predicted.attainment - chosen.attainment) / chosen.attainment
    figures = [
        Figure(f"plan_{name}_gpus", chosen.fleet.gpus, "GPUs", peer=str(chosen.fleet)),
        Figure(f"plan_{name}_simulated_attainment", round(chosen.attainment, 4), "share", f">= {GOOD}", True),
        Figure(f"plan_{name}_prediction_error", round(error, 4), "share", "<= 0.10", error <= 0.1),
    ]
    if arguments.brute_force:
        smaller = _smaller(offers, chosen.fleet.gpus)
        done = {str(tried.fleet) for tried in plan.rejected}
        met = [fleet for fleet in smaller if str(fleet) not in done and _attainment(fleet, requests) >= GOOD]
        CONSOLE.print(
            f"{len(smaller)} fleets with a few GPUs fewer, of which {len(met)} would do: {met or ''}"
        )
        figures.append(Figure(f"plan_{name}_smaller_fleets_that_do", len(met), "fleets", "0", not met))
    return figures


def _smaller(offers: Sequence[Offer], gpus: int) -> list[Fleet]:
    """Every fleet of both roles with fewer GPUs, but for those to which a worker may be added."""
    most = max(offer.gpus for offer in offers)
    return [
        fleet
        for prefill in offers
        for decode in offers
        for prefills in range(1, gpus)
        for decoders in range(1, gpus)
        if gpus - most <= (fleet := Fleet(prefill, prefills, decode, decoders)).gpus < gpus
    ]


def _attainment(fleet: Fleet, requests: Sequence[SimRequest]) -> float:
    return simulate(fleet.cluster(LIKE), requests, TARGETS).summary.attainment or 0.0


# ---- a day ----------------------------------------------------------------------------------------

LONG_PROMPTS = (2000, 50)
LONG_ANSWERS = (300, 400)


BUSIEST = 20.0


def rate(hour: float) -> float:
    """Requests per second at an hour of the day; those of the hour from three on are the burst."""
    hours = ((3, 4.0), (4, 20.0), (5, 4.0), (14, 12.0), (22, BUSIEST), (24, 4.0))
    return next(per_s for until, per_s in hours if hour < until)


def day(hour_s: float, seed: int = 1) -> Iterator[TraceRow]:
    """The requests of 24 hours: long prompts until noon, long answers from two o'clock, both in between."""
    rng = Random(seed)
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(BUSIEST)) < 24 * hour_s:
        hour = at_s / hour_s
        if rng.random() >= rate(hour) / BUSIEST:
            continue
        later = min(1.0, max(0.0, (hour - 12) / 2))
        prompt, answer = LONG_ANSWERS if rng.random() < later else LONG_PROMPTS
        spread = rng.uniform(0.5, 1.5)
        yield TraceRow(at_s, int(prompt * spread), int(answer * rng.uniform(0.5, 1.5)))


@dataclass(frozen=True)
class DayRun:
    """A day on one cluster; `planner` is None where nothing changed."""

    name: str
    report: SimReport
    planner: SimulatedPlanner | None

    @property
    def attainment(self) -> float:
        return self.report.summary.attainment or 0.0

    def by_hour(self, hour_s: float) -> list[float]:
        """Attainment of the requests of each hour."""
        good, total = [0] * 24, [0] * 24
        for record in self.report.records:
            hour = min(23, int(record.scheduled_s / hour_s))
            total[hour] += 1
            good[hour] += TARGETS.met_by(record)
        return [met / max(1, asked) for met, asked in zip(good, total, strict=True)]


def days(arguments: argparse.Namespace) -> list[Figure]:
    """The day on every fixed ratio, with scaling alone, and with flips."""
    offer = offer_of("distserve:opt-13b:1", OPT)
    offer = replace(offer, spec=replace(offer.spec, itl_target_s=arguments.itl_target_s))
    requests = list(from_trace(day(arguments.hour_s), OPT.block_tokens))

    def fixed(prefills: int) -> SimCluster:
        return Fleet(offer, prefills, offer, BUDGET - prefills).cluster(LIKE)

    def planned(name: str, aims: Aims) -> DayRun:
        new = {role: offer.as_role(role) for role in (Role.PREFILL, Role.DECODE)}
        cluster = fixed(BUDGET // 2)
        planner = SimulatedPlanner(Controller(aims), cluster, new, arguments.start_s)
        report = simulate(cluster, requests, TARGETS, controller=planner, interval_s=INTERVAL_S)
        return DayRun(name, report, planner)

    one = {Role.PREFILL: 1, Role.DECODE: 1}
    aims = Aims(budget=BUDGET, gpus=one, least=one, tpot_s=TARGETS.tpot_s or 0.1)
    ratios = range(3, 6) if arguments.quick else range(1, BUDGET)
    runs = [DayRun(f"{n} : {BUDGET - n}", simulate(fixed(n), requests, TARGETS), None) for n in ratios]
    best = max(runs, key=lambda run: run.attainment)
    scaling = planned("planner without flips", replace(aims, flip_share=0.0))
    flips = planned("planner", aims)
    runs += [scaling, flips]
    table = Table(
        *("prefill : decode", "in time", "worst hour", "failed", "TTFT p99, s", "TPOT p99, s", "GPU hours"),
        title=f"{len(requests)} requests, 24 hours of {arguments.hour_s:g} s, {BUDGET} GPUs",
    )
    for run in runs:
        summary = run.report.summary
        tails = [latency.p99 if latency else None for latency in (summary.ttft, summary.tpot)]
        table.add_row(
            run.name,
            f"{run.attainment:.1%}",
            f"{min(run.by_hour(arguments.hour_s)):.1%}",
            str(summary.failed),
            *("" if tail is None else f"{tail:.2f}" for tail in tails),
            f"{run.report.gpu_s / arguments.hour_s:.0f}",
        )
    CONSOLE.print(table)
    if arguments.plot is not None:
        _plot([best, scaling, flips], arguments.hour_s, arguments.plot)
    late = {run.name: 1 - run.attainment for run in (best, scaling, flips)}
    return [
        Figure("day_attainment_planner", round(flips.attainment, 4), "share"),
        _against("best_fixed_ratio", flips, best, f"{best.name}: {best.attainment:.4f}"),
        _against("scaling_without_flips", flips, scaling, f"{scaling.attainment:.4f}"),
        Figure(
            "day_late_requests_over_best_fixed_ratio",
            round(late[flips.name] / max(1e-9, late[best.name]), 3),
            "ratio",
            "< 1",
            late[flips.name] < late[best.name],
        ),
        Figure(
            "day_gpu_hours_over_fixed", round(flips.report.gpu_s / best.report.gpu_s, 3), "ratio", "<= 1",
            flips.report.gpu_s <= best.report.gpu_s,
        ),
    ]  # fmt: skip


def _against(name: str, run: DayRun, other: DayRun, peer: str) -> Figure:
    value = run.attainment / max(1e-9, other.attainment)
    return Figure(f"day_attainment_over_{name}", round(value, 4), "ratio", "> 1", value > 1, peer)


def _plot(runs: Sequence[DayRun], hour_s: float, file: Path) -> None:
    # Here, not above: matplotlib is of the extra `bench`.
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9, 7), layout="constrained")
    load, late, roles = drawing.subplots(3, 1, sharex=True)
    hours = [number / 20 for number in range(480)]
    load.plot(hours, [rate(hour) for hour in hours], color="black")
    load.set(ylabel="requests/s", title="Long prompts until 12, long answers from 14; a burst at 3")
    for number, run in enumerate(runs):
        color = f"C{number}"
        shares = [100 * share for share in run.by_hour(hour_s)]
        late.stairs(shares, range(25), baseline=None, color=color, label=run.name)
        history = run.planner.history if run.planner is not None else []
        for role, style in ((Role.PREFILL, "-"), (Role.DECODE, ":")):
            times = [moment.now_s / hour_s for moment in history]
            counts = [moment.workers.get(role, 0) for moment in history]
            if history:
                label = f"{run.name}: {role.value}"
                roles.step(times, counts, style, where="post", color=color, label=label)
    late.set(ylabel="in time, %", ylim=(0, 102))
    late.legend(loc="lower right", frameon=False)
    roles.set(ylabel="workers", xlabel="hour", ylim=(0, BUDGET))
    roles.legend(loc="center right", frameon=False)
    for axes in (load, late, roles):
        axes.grid(alpha=0.3)
    drawing.savefig(file)
    CONSOLE.print(f"plot: {file}")


def main() -> None:
    arguments = _arguments()
    figures = [
        *plans("code", arguments.code, arguments),
        *plans("conversation", arguments.conversation, arguments),
        *days(arguments),
    ]
    report = {
        "benchmark": "planner",
        "device": f"virtual; {platform.machine()}",
        "versions": {"baton": __version__, "python": platform.python_version()},
        "figures": [vars(figure) for figure in figures],
    }
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--code", type=Path, help="Azure's code trace")
    parser.add_argument("--conversation", type=Path, help="Azure's conversation trace")
    parser.add_argument("--requests", type=int, default=3000, help="of each trace [3000]")
    parser.add_argument("--brute-force", action="store_true", help="simulate every smaller fleet")
    parser.add_argument("--hour-s", type=float, default=60.0, help="seconds of an hour of the day [60]")
    parser.add_argument("--start-s", type=float, default=30.0, help="seconds a new worker takes [30]")
    parser.add_argument(
        "--itl-target-s", type=float, default=0.0, help="the setting of that name of the day's workers [0]"
    )
    parser.add_argument("--plot", type=Path, help="file for a plot of the day, such as day.svg")
    parser.add_argument("--quick", action="store_true", help="fewer requests, a shorter day")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.requests = min(arguments.requests, 150)
        arguments.hour_s = min(arguments.hour_s, 5.0)
        arguments.start_s = min(arguments.start_s, 5.0)
    return arguments


if __name__ == "__main__":
    main()
