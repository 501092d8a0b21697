"""What `baton bench` and `baton simulate` have in common: the flags of a load, and where results go."""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from baton.bench.arrivals import Pattern
from baton.bench.load import Synthetic
from baton.bench.plan import Load
from baton.bench.result import Result, Run, save
from baton.bench.table import table
from baton.bench.trace import TraceKind
from baton.cli.files import READ, file_to_write
from baton.cli.options import together

POSITIVE = click.FloatRange(min=0, min_open=True)

_EXTRA = "this needs aiohttp and matplotlib: pip install 'baton-serve[bench]'"


class _Rates(click.ParamType[tuple[float, ...]]):
    """Numbers above 0, with commas between them."""

    name = "R,R,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            rates = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number, nor numbers with commas between them", param, ctx)
        if not all(0 < rate < float("inf") for rate in rates):
            self.fail(f"{value!r}: rates must be above 0", param, ctx)
        return rates


load_options = together(
    click.option(
        "--request-rate",
        "rates",
        type=_Rates(),
        default=(),
        help="open loop: requests per second; several, with commas, are a sweep",
    ),
    click.option(
        "--arrival-pattern",
        "pattern",
        type=click.Choice(get_args(Pattern)),
        default="poisson",
        show_default=True,
    ),
    click.option(
        "--burstiness",
        type=POSITIVE,
        default=1.0,
        show_default=True,
        help="of poisson: below 1 is burstier",
    ),
    click.option("--concurrency", type=click.IntRange(min=1), help="closed loop: requests in flight"),
    click.option("--num-prompts", type=click.IntRange(min=1), help="requests per run at most"),
    click.option("--duration", type=POSITIVE, help="seconds in which a run sends requests, at most"),
    click.option("--trace", type=READ, help="replay a recorded workload instead of made-up lengths"),
    click.option(
        "--trace-kind",
        type=click.Choice(get_args(TraceKind)),
        help="[by the file's suffix: jsonl, csv, json]",
    ),
    click.option("--trace-speed", type=POSITIVE, default=1.0, show_default=True, help="2 is twice as fast"),
    click.option(
        "--length-scale",
        type=POSITIVE,
        default=1.0,
        show_default=True,
        help="multiply the trace's lengths, for small models; what prompts share stays shared",
    ),
    click.option("--input-len", type=click.IntRange(min=1), default=512, show_default=True, help="tokens"),
    click.option("--output-len", type=click.IntRange(min=1), default=128, show_default=True, help="tokens"),
    click.option(
        "--range-ratio",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        help="lengths are drawn evenly from 1 - this to 1 + this times the mean",
    ),
    click.option(
        "--prefix-len",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="leading tokens of the input that all requests share",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
)
"""The flags that say which requests come when; see `load_of`."""


def load_of(given: dict[str, Any], *, warmup: int = 0, text: bool = False) -> Load:
    """The load that the flags of `load_options` ask for.

    Raises:
        BadSetting: they contradict each other.
    """
    load = Load(
        synthetic=Synthetic(
            given["input_len"], given["output_len"], given["prefix_len"], given["range_ratio"]
        ),
        trace=given["trace"],
        trace_kind=given["trace_kind"],
        trace_speed=given["trace_speed"],
        length_scale=given["length_scale"],
        rates=given["rates"],
        pattern=given["pattern"],
        burstiness=given["burstiness"],
        concurrency=given["concurrency"],
        requests=given["num_prompts"],
        duration_s=given["duration"],
        warmup=warmup,
        seed=given["seed"],
        text=text,
    )
    load.check()
    return load


slo_options = together(
    click.option("--slo-ttft", type=POSITIVE, help="target: seconds to the first token"),
    click.option("--slo-tpot", type=POSITIVE, help="target: mean seconds per token after it"),
)
"""The flags that say what is in time."""

report_options = together(
    slo_options,
    file_to_write("--out", "file for the figures, as JSON"),
    file_to_write("--html", "file for a report with plots, which needs nothing else"),
)
"""The flags that `baton bench` and `baton simulate` share: what is good, what it costs, where it goes."""


def require(*modules: str) -> None:
    """
    Raises:
        ClickException: a module of the extra is not installed; says which extra.
    """
    if any(importlib.util.find_spec(name) is None for name in modules):
        raise click.ClickException(_EXTRA)


def write(result: Result, out: Path | None, html: Path | None) -> None:
    """Print a result, and write it where it was asked for."""
    console = Console()
    console.print(table(result.runs))
    if out is not None:
        save(result, out)
    if html is not None:
        # Here, not above: it loads matplotlib, which the base install does not have.
        from baton.bench.html import page

        html.write_text(page(result))
        console.print(f"report: {html}", soft_wrap=True)


def result_of(kind: str, settings: dict[str, Any], runs: list[Run]) -> Result:
    """A result of now, with the settings that were given."""
    shown = {name: str(value) for name, value in settings.items() if value not in (None, (), "")}
    shown.pop("api_key", None)
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Result(kind, created, {"baton": version("baton-serve")}, shown, runs)
