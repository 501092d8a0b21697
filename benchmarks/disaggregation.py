"""Where one prefill and one decode worker beat two hybrid workers of the same size, and where they do not.

    python benchmarks/disaggregation.py [--quick] [--rates R ...] [--plot FILE.svg]

Three placements on the same cores, one thread per worker, loaded in turn with the same Poisson arrivals:
prompts always prefilled apart, never, and as the router chooses (`--policy prefix`). A placement's goodput is
the highest rate of requests at which 90 % of them meet both objectives, time to first token and time per
output token (DistServe's definition), between measured rates by interpolation. What a request may take is a
multiple of what it takes alone. Where prompts are prefilled beside decoding requests, the cluster is told the
objective (`--itl-target-s`, a tenth below it), so there is one cluster for each.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import uvloop
from engine import Shape
from rich.console import Console
from rich.table import Table
from served import Figure, Streamed, figure, print_report, random_tokens, served_folder, stream

from tests.cluster import Cluster, run_cluster

MODEL = Shape("60m", 512, 8, 8, 4, 1408)
PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 32
APART, HYBRID, FREE = "1 prefill + 1 decode", "2 hybrid", "free"
PLACEMENTS = {
    APART: ("--prefill", "1", "--decode", "1", "--policy", "least-loaded"),
    HYBRID: ("--hybrid", "2", "--policy", "prefix"),
    FREE: ("--prefill", "1", "--decode", "1", "--policy", "prefix"),
}
#: The ITL target, as a share of the objective: a step's prediction errs.
MARGIN = 0.9
SHARE = 0.9
#: Rates as shares of the prompts per second that one core prefills and does nothing else.
RATES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2)
QUICK_RATES = (0.4, 0.8)


@dataclass(frozen=True)
class Objectives:
    """What a request may take, in multiples of what it takes on an idle cluster."""

    name: str
    ttft: float
    tpot: float


OBJECTIVES = (
    Objectives("strict", ttft=4, tpot=1.5),
    Objectives("loose", ttft=4, tpot=5),
)


@dataclass(frozen=True)
class Alone:
    """A request on an idle cluster."""

    ttft_s: float
    tpot_s: float

    def met(self, done: Streamed, objectives: Objectives) -> bool:
        in_time = done.ttft_s <= objectives.ttft * self.ttft_s
        return in_time and done.tpot_s <= objectives.tpot * self.tpot_s


Sweep = Mapping[float, Sequence[Streamed]]
"""Requests by the rate at which they were sent, requests per second."""

Swept = Mapping[str, Mapping[str, Sweep]]
"""Sweeps by objectives and placement."""


async def poisson(cluster: Cluster, rate: float, seconds: float, seed: int) -> list[Streamed]:
    """Requests that arrive independently of each other, `rate` per second, for so many seconds."""
    draw = random.Random(seed)
    tasks = []
    async with asyncio.TaskGroup() as group:
        started_s = at_s = asyncio.get_running_loop().time()
        while (at_s := at_s + draw.expovariate(rate)) < started_s + seconds:
            await asyncio.sleep(at_s - asyncio.get_running_loop().time())
            prompt = random_tokens(PROMPT_TOKENS, draw)
            tasks.append(group.create_task(stream(cluster.base_url, prompt, OUTPUT_TOKENS)))
    return [task.result() for task in tasks]


async def one_by_one(cluster: Cluster, requests: int) -> list[Streamed]:
    draw = random.Random()
    return [
        await stream(cluster.base_url, random_tokens(PROMPT_TOKENS, draw), OUTPUT_TOKENS)
        for _ in range(requests)
    ]


def attainment(done: Sequence[Streamed], alone: Alone, objectives: Objectives) -> float:
    """Share of the requests that met both objectives; 1 of none."""
    return sum(alone.met(one, objectives) for one in done) / len(done) if done else 1.0


def goodput(sweep: Sweep, alone: Alone, objectives: Objectives) -> float:
    """Requests per second up to which `SHARE` of them meet both objectives."""
    met = [(rate, attainment(done, alone, objectives)) for rate, done in sorted(sweep.items())]
    points = [(0.0, 1.0), *met]
    for (before, enough), (rate, share) in pairwise(points):
        if share < SHARE:
            return before + (rate - before) * (enough - SHARE) / (enough - share)
    return points[-1][0]


def p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def measure(rates: Sequence[float] | None, shares: Sequence[float], seconds: float) -> tuple[Swept, Alone]:
    """Every placement's sweep under every objective, and what a request takes alone."""
    folder = served_folder(MODEL)
    with ExitStack() as stack:

        def start(placement: str, *flags: str) -> Cluster:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            flags = (*PLACEMENTS[placement], "--threads", "1", "--dtype", "bfloat16", *flags)
            cluster = stack.enter_context(run_cluster(scratch, *flags, model=folder))
            uvloop.run(one_by_one(cluster, 3))  # what is done once is done once
            return cluster

        apart = start(APART)
        idle = uvloop.run(one_by_one(apart, 5))
        alone = Alone(median(one.ttft_s for one in idle), median(one.tpot_s for one in idle))
        clusters = {(APART, objectives.name): apart for objectives in OBJECTIVES}
        for objectives in OBJECTIVES:
            target = f"{MARGIN * objectives.tpot * alone.tpot_s:.4f}"
            for placement in (HYBRID, FREE):
                clusters[placement, objectives.name] = start(placement, "--itl-target-s", target)
        swept: dict[Cluster, dict[float, list[Streamed]]] = {each: {} for each in clusters.values()}
        for seed, rate in enumerate(rates or [share / alone.ttft_s for share in shares]):
            for cluster, sweep in swept.items():
                sweep[rate] = uvloop.run(poisson(cluster, rate, seconds, seed))
    return {
        objectives.name: {placement: swept[clusters[placement, objectives.name]] for placement in PLACEMENTS}
        for objectives in OBJECTIVES
    }, alone


def show(console: Console, swept: Swept, alone: Alone) -> list[Figure]:
    console.print(
        f"{PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out; alone: TTFT {1e3 * alone.ttft_s:.0f} ms, "
        f"TPOT {1e3 * alone.tpot_s:.1f} ms"
    )
    figures: list[Figure] = []
    for objectives in OBJECTIVES:
        sweeps, name = swept[objectives.name], f"goodput_{objectives.name}"
        limits = f"TTFT {objectives.ttft:g} x and TPOT {objectives.tpot:g} x alone"
        console.print(_table(f"{objectives.name}: {limits}", sweeps, alone, objectives))
        best = {placement: goodput(sweep, alone, objectives) for placement, sweep in sweeps.items()}
        console.print(
            "goodput: " + ", ".join(f"{placement} {value:.2f}/s" for placement, value in best.items())
        )
        better = max(best[APART], best[HYBRID])
        figures += [
            *(figure(f"{name}_{placement}", value, "requests/s") for placement, value in best.items()),
            figure(
                f"{name}_apart_vs_hybrid",
                best[APART] / best[HYBRID] if best[HYBRID] else None,
                "ratio",
                peer=HYBRID,
            ),
            figure(
                f"{name}_free_vs_better",
                best[FREE] / better if better else None,
                "ratio",
                at_least=0.95,
                peer="the better of the two",
            ),
        ]
    return figures


def _table(title: str, sweeps: Mapping[str, Sweep], alone: Alone, objectives: Objectives) -> Table:
    table = Table("requests/s", "placement", "TTFT p50", "p90", "TPOT p50", "p90", "ITL p99", title=title)
    table.add_column("both met", justify="right")
    for rate in sweeps[APART]:
        for placement, sweep in sweeps.items():
            done = sweep[rate]
            if len(done) < 2:
                continue
            ttft, tpot = [one.ttft_s for one in done], [one.tpot_s for one in done]
            values = (median(ttft), quantiles(ttft, n=10)[8], median(tpot), quantiles(tpot, n=10)[8])
            gaps = p99([gap for one in done for gap in one.gaps_s])
            times = (f"{1e3 * value:.0f} ms" for value in (*values, gaps))
            table.add_row(f"{rate:.2f}", placement, *times, f"{attainment(done, alone, objectives):.0%}")
    return table


def plot(path: Path, swept: Swept, alone: Alone) -> None:
    """Attainment and ITL p99 by rate for each pair of objectives; needs the extra `bench`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(
        2, len(OBJECTIVES), figsize=(5 * len(OBJECTIVES), 6), layout="constrained", squeeze=False
    )
    for objectives, (met, gap) in zip(OBJECTIVES, axes.T, strict=True):
        for placement, sweep in swept[objectives.name].items():
            rates = sorted(sweep)
            shares = [attainment(sweep[rate], alone, objectives) for rate in rates]
            gaps = [p99([gap for one in sweep[rate] for gap in one.gaps_s]) for rate in rates]
            met.plot(rates, shares, "o-", label=placement)
            gap.plot(rates, [1e3 * value for value in gaps], "o-")
        met.axhline(SHARE, color="grey", linewidth=0.8, linestyle="--")
        met.set_ylim(0, 1.05)
        met.set_title(f"{objectives.name}: TTFT {objectives.ttft:g} x, TPOT {objectives.tpot:g} x alone")
        gap.set_xlabel("requests per second")
    axes[0, 0].set_ylabel("share of requests that meet both")
    axes[1, 0].set_ylabel("gaps between tokens, p99, ms")
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rates, a few seconds each")
    parser.add_argument("--rates", type=float, nargs="+", help="requests per second [from the model's speed]")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, per placement and rate")
    parser.add_argument("--plot", type=Path, help="where to draw the sweep (.svg, .png)")
    arguments = parser.parse_args()
    seconds, shares = (5.0, QUICK_RATES) if arguments.quick else (arguments.seconds, RATES)
    swept, alone = measure(arguments.rates, shares, seconds)
    figures = show(Console(width=150), swept, alone)
    if arguments.plot:
        plot(arguments.plot, swept, alone)
    print_report("disaggregation", figures)


if __name__ == "__main__":
    main()
