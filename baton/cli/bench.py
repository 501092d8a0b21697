"""`baton bench`: put load on a server and say how it did."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from baton.bench.arrivals import Pattern
from baton.bench.load import Synthetic
from baton.bench.plan import Bench, Load, Server, run_bench
from baton.bench.records import RequestRecord
from baton.bench.result import Result, load, save, side_by_side
from baton.bench.summary import Targets
from baton.bench.table import table
from baton.bench.trace import TraceKind
from baton.cli.options import settings_options
from baton.config import BadSetting, Settings

if TYPE_CHECKING:
    from baton.bench.client import Client

Endpoint = Literal["completions", "chat", "grpc"]

_EXTRA = "this needs aiohttp and matplotlib: pip install 'baton-serve[bench]'"
_POSITIVE = click.FloatRange(min=0, min_open=True)
_FILE = click.Path(dir_okay=False, path_type=Path)


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


def report_options(command: Callable[..., None]) -> Callable[..., None]:
    """The flags that `baton bench` and `baton simulate` share: what is good, what it costs, where it goes."""
    for option in reversed(
        (
            click.option("--slo-ttft", type=_POSITIVE, help="target: seconds to the first token"),
            click.option("--slo-tpot", type=_POSITIVE, help="target: mean seconds per token after it"),
            click.option("--out", type=_FILE, help="file for the figures, as JSON"),
            click.option("--html", type=_FILE, help="file for a report with plots, which needs nothing else"),
        )
    ):
        command = option(command)
    return command


@click.command()
@settings_options("client")
@click.option(
    "--endpoint", type=click.Choice(get_args(Endpoint)), default="completions", show_default=True,
    help="what the server is asked: OpenAI's HTTP, or baton's gRPC (--url HOST:PORT)",
)  # fmt: skip
@click.option("--model", help="model to ask for [the server's first]")
@click.option("--api-key", envvar="OPENAI_API_KEY", default="", help="[env OPENAI_API_KEY]")
@click.option("--label", default="", help="name in the report [the server's address]")
@click.option(
    "--peer", "peers", multiple=True, metavar="LABEL=URL",
    help="another server that gets the same load after the first; may be repeated",
)  # fmt: skip
@click.option(
    "--request-rate", "rates", type=_Rates(), default=(),
    help="open loop: requests per second; several, with commas, are a sweep",
)  # fmt: skip
@click.option(
    "--arrival-pattern", "pattern", type=click.Choice(get_args(Pattern)), default="poisson", show_default=True
)
@click.option(
    "--burstiness", type=_POSITIVE, default=1.0, show_default=True, help="of poisson: below 1 is burstier"
)
@click.option("--concurrency", type=click.IntRange(min=1), help="closed loop: requests in flight")
@click.option("--num-prompts", type=click.IntRange(min=1), help="requests per run at most")
@click.option("--duration", type=_POSITIVE, help="seconds in which a run sends requests, at most")
@click.option("--trace", type=_FILE, help="replay a recorded workload instead of made-up lengths")
@click.option(
    "--trace-kind", type=click.Choice(get_args(TraceKind)), help="[by the file's suffix: jsonl, csv, json]"
)
@click.option("--trace-speed", type=_POSITIVE, default=1.0, show_default=True, help="2 is twice as fast")
@click.option(
    "--length-scale", type=_POSITIVE, default=1.0, show_default=True,
    help="multiply the trace's lengths, for small models; what prompts share stays shared",
)  # fmt: skip
@click.option("--input-len", type=click.IntRange(min=1), default=512, show_default=True, help="tokens")
@click.option("--output-len", type=click.IntRange(min=1), default=128, show_default=True, help="tokens")
@click.option(
    "--range-ratio", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="lengths are drawn evenly from 1 - this to 1 + this times the mean",
)  # fmt: skip
@click.option(
    "--prefix-len", type=click.IntRange(min=0), default=0, show_default=True,
    help="leading tokens of the input that all requests share",
)  # fmt: skip
@click.option("--text", is_flag=True, help="send words where token ids could be sent")
@click.option(
    "--ignore-eos/--no-ignore-eos", default=True, show_default=True,
    help="ask for full-length answers, in a field that some servers refuse",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(min=0), default=4, show_default=True, help="requests not counted"
)
@click.option("--timeout", type=_POSITIVE, default=600.0, show_default=True, help="seconds per request")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--price-per-hour", type=_POSITIVE, help="of the whole server, in any currency")
@report_options
@click.option(
    "--compare", nargs=2, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="A B",
    help="send nothing: put two files of --out side by side",
)  # fmt: skip
@click.option("--progress/--no-progress", default=True, help="a progress bar on a terminal")
def bench(settings: Settings, compare: tuple[Path, Path] | None, **given: Any) -> None:
    """Put load on an OpenAI-compatible server, or on baton's gRPC, and say how it did.

    Open loop (--request-rate, or a --trace's own times): requests are sent when they are due, however slow
    the server is, and latencies count from then. Closed loop (--concurrency): each is sent when one ends.
    """
    out, html = given["out"], given["html"]
    needed = ("matplotlib",) if html else ()
    if compare is not None:
        _require(needed)
        found = side_by_side({_name(path, compare): load(path) for path in compare})
    else:
        _require((*needed, *(("aiohttp",) if given["endpoint"] != "grpc" else ())))
        found = _measure(settings.client.url, given)
    write(found, out, html)


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


def result_of(kind: str, settings: dict[str, Any], runs: list[Any]) -> Result:
    """A result of now, with the settings that were given."""
    shown = {name: str(value) for name, value in settings.items() if value not in (None, (), "")}
    shown.pop("api_key", None)
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Result(kind, created, {"baton": version("baton-serve")}, shown, runs)


def _measure(url: str, given: dict[str, Any]) -> Result:
    planned = Load(
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
        warmup=given["warmup"],
        seed=given["seed"],
        text=given["text"],
    )
    servers = [Server(given["label"] or url.removeprefix("http://"), _client(url, given))]
    for peer in given["peers"]:
        label, _, address = peer.partition("=")
        if not label or not address:
            raise BadSetting(f"--peer {peer!r} is not LABEL=URL")
        servers.append(Server(label, _client(address, given)))
    plan = Bench(planned, Targets(given["slo_ttft"], given["slo_tpot"]), given["price_per_hour"])
    with _Bar(shown=given["progress"]) as bar:
        runs = run_bench(plan, servers, bar.begin)
    return result_of("bench", {"url": url, **given}, runs)


def _client(url: str, given: dict[str, Any]) -> Client:
    # Here, not above: aiohttp is of an extra.
    if given["endpoint"] == "grpc":
        from baton.bench.grpc_client import GrpcClient

        address = url.removeprefix("http://")
        return GrpcClient(address, given["model"], timeout_s=given["timeout"], ignore_eos=given["ignore_eos"])
    if not url.startswith(("http://", "https://")):
        raise BadSetting(f"{url!r} is no HTTP address; --endpoint grpc takes HOST:PORT", field="url")
    from baton.bench.http_client import HttpClient

    return HttpClient(
        url,
        given["endpoint"],
        given["model"],
        api_key=given["api_key"],
        timeout_s=given["timeout"],
        ignore_eos=given["ignore_eos"],
    )


def _require(modules: tuple[str, ...]) -> None:
    if any(importlib.util.find_spec(name) is None for name in modules):
        raise click.ClickException(_EXTRA)


def _name(path: Path, both: tuple[Path, Path]) -> str:
    """A file's name, or its whole path where both are called the same."""
    return path.stem if both[0].stem != both[1].stem else str(path)


class _Bar:
    """Progress on the terminal's standard error."""

    def __init__(self, *, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not shown or not sys.stderr.isatty(),
            refresh_per_second=4,
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, label: str, total: int | None) -> Callable[[RequestRecord], None]:
        """See `baton.bench.plan.Begin`."""
        task = self._progress.add_task(label, total=total, failed="")
        failures = 0

        def over(record: RequestRecord) -> None:
            nonlocal failures
            failures += bool(record.error)
            self._progress.update(task, advance=1, failed=f"{failures} failed" if failures else "")

        return over
