"""Runs as a table: a column per run, a row per figure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from baton.bench.result import Run
from baton.bench.summary import Latency

_PERCENTILES = ("p50", "p90", "p95", "p99")
_LATENCIES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "tbt": "TBT (Mooncake)",
    "e2e": "end to end",
}


def rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name of the figure, its value in each run), without those that no run has."""
    found: list[tuple[str, list[str]]] = [("load", [run.load for run in runs])]

    def add(name: str, values: Sequence[str]) -> None:
        if any(values):
            found.append((name, list(values)))

    summaries = [run.summary for run in runs]
    add("requests", [f"{s.requests}" for s in summaries])
    add("failed", [_failures(s.failed, s.errors) for s in summaries])
    add("duration", [f"{s.duration_s:.1f} s" for s in summaries])
    add("requests/s", [f"{s.requests_per_s:.2f}" for s in summaries])
    add("input tokens/s", [f"{s.input_tokens_per_s:.0f}" for s in summaries])
    add("output tokens/s", [f"{s.output_tokens_per_s:.0f}" for s in summaries])
    add("prompt tokens cached", [_share(s.cached_tokens, s.input_tokens) for s in summaries])
    for field, name in _LATENCIES.items():
        for percentile in _PERCENTILES:
            add(f"{name} {percentile}", [_latency(getattr(s, field), percentile) for s in summaries])
    add(
        "goodput, requests/s",
        ["" if s.goodput_per_s is None else f"{s.goodput_per_s:.2f}" for s in summaries],
    )
    add(
        "within the targets",
        ["" if s.attainment is None else f"{100 * s.attainment:.1f} %" for s in summaries],
    )
    add("cost of 1 M output tokens", [_cost(s.cost_per_1m_output_tokens) for s in summaries])
    add("cost of 1 M tokens", [_cost(s.cost_per_1m_tokens) for s in summaries])
    add("client late by p99", [_latency(s.lateness, "p99") for s in summaries])
    return found


def table(runs: Sequence[Run]) -> Table:
    """The rows for a terminal."""
    shown = Table("", *(run.label for run in runs))
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, values in rows(runs):
        shown.add_row(name, *values)
    return shown


def _failures(failed: int, errors: dict[str, int]) -> str:
    if not failed:
        return "0"
    return f"{failed}: " + ", ".join(f"{count} {error}" for error, count in sorted(errors.items()))


def _latency(latency: Latency | None, percentile: str) -> str:
    if latency is None:
        return ""
    seconds = getattr(latency, percentile)
    if seconds is None:
        return "failed"
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if part and whole else ""


def _cost(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.4g}"
