"""Plots of runs, as SVG text. Needs matplotlib, of the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from itertools import accumulate
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from baton.bench.result import Run

_MOST_POINTS = 2000
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "baton",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def plots(runs: Sequence[Run]) -> dict[str, str]:
    """What can be drawn of the runs: titles, and SVG elements."""
    drawn = {
        "Latencies: share of requests that were as fast": _svg(runs, _cdfs, columns=4),
        "Time to first token against input length": _svg(runs, _against_input),
        "Timeline: each request's time to first token and end to end": _svg(runs, _timeline, columns=2),
    }
    if len({run.rate for run in runs if run.rate is not None}) > 1:
        drawn["Throughput against latency, over the rates"] = _svg(runs, _sweep, columns=2)
    return drawn


def _svg(runs: Sequence[Run], draw: Callable[[Sequence[Run], Sequence[Axes]], None], columns: int = 1) -> str:
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(max(6.5, 3.2 * columns), 3.2), layout="constrained")
        draw(runs, [figure.add_subplot(1, columns, 1 + at) for at in range(columns)])
        if len(runs) > 1:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(runs)), frameon=False)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _cdfs(runs: Sequence[Run], axes: Sequence[Axes]) -> None:
    for number, run in enumerate(runs):
        requests = run.requests
        columns = {"TTFT": requests.ttft_s, "TPOT": requests.tpot_s, "end to end": requests.e2e_s}
        for at, (name, seconds) in zip(axes, columns.items(), strict=False):
            # A failed request never comes: the curve ends below 1.
            known = sorted(value for value in seconds if value is not None)
            shares = [(rank + 1) / len(seconds) for rank in range(len(known))]
            _step(at, name, known, shares, run.label, number)
        shares = [count / max(1, sum(n for _, n in run.itl)) for _, count in run.itl]
        _step(axes[3], "ITL", [gap for gap, _ in run.itl], list(accumulate(shares)), run.label, number)


def _step(
    axes: Axes, name: str, seconds: Sequence[float], shares: Sequence[float], label: str, number: int
) -> None:
    every = max(1, len(seconds) // _MOST_POINTS)
    axes.plot(seconds[::every], shares[::every], color=f"C{number}", label=label)
    axes.set(xlabel=f"{name}, s", ylim=(0, 1.02))
    axes.set_xlim(left=0)


def _against_input(runs: Sequence[Run], axes: Sequence[Axes]) -> None:
    for number, run in enumerate(runs):
        points = _thinned(zip(run.requests.input_tokens, run.requests.ttft_s, strict=True))
        axes[0].plot(*_columns(points), ".", color=f"C{number}", alpha=0.5, label=run.label)
    axes[0].set(xlabel="input tokens", ylabel="TTFT, s")
    axes[0].set_ylim(bottom=0)


def _timeline(runs: Sequence[Run], axes: Sequence[Axes]) -> None:
    for number, run in enumerate(runs):
        for at, seconds in zip(axes, (run.requests.ttft_s, run.requests.e2e_s), strict=True):
            points = _thinned(zip(run.requests.scheduled_s, seconds, strict=True))
            at.plot(*_columns(points), ".", color=f"C{number}", alpha=0.5, label=run.label)
            at.set_ylim(bottom=0)
        failed = [
            due
            for due, seconds_ in zip(run.requests.scheduled_s, run.requests.e2e_s, strict=True)
            if seconds_ is None
        ]
        if failed:
            axes[0].plot(failed, [0.0] * len(failed), "x", color=f"C{number}", label="failed")
    axes[0].set(xlabel="due at, s", ylabel="TTFT, s")
    axes[1].set(xlabel="due at, s", ylabel="end to end, s")


def _sweep(runs: Sequence[Run], axes: Sequence[Axes]) -> None:
    """A point per rate, a line per what was measured; labels are `NAME @ RATE`."""
    lines: dict[str, list[Run]] = {}
    for run in runs:
        lines.setdefault(run.label.split(" @ ")[0], []).append(run)
    for name, points in lines.items():
        points.sort(key=lambda run: run.rate or 0.0)
        throughput = [run.summary.output_tokens_per_s for run in points]
        for at, field in zip(axes, ("ttft", "tpot"), strict=True):
            for percentile, style in (("p50", "o-"), ("p99", "s--")):
                latencies = [getattr(run.summary, field) for run in points]
                known = [None if found is None else getattr(found, percentile) for found in latencies]
                pairs = _thinned(zip(throughput, known, strict=True))
                at.plot(*_columns(pairs), style, label=f"{name} {percentile}")
            at.set(xlabel="output tokens/s", ylabel=f"{field.upper()}, s")
            at.set_ylim(bottom=0)


def _thinned(points: Iterable[tuple[float, float | None]]) -> list[tuple[float, float]]:
    known = [(x, y) for x, y in points if y is not None]
    return known[:: max(1, len(known) // _MOST_POINTS)]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
