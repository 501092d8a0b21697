"""`baton bench`: put load on a server and say how it did."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from baton.bench.plan import Bench, Server, run_bench
from baton.bench.records import RequestRecord
from baton.bench.result import Result, load, side_by_side
from baton.bench.summary import Targets
from baton.cli.files import READ
from baton.cli.load_options import POSITIVE, load_of, load_options, report_options, require, result_of, write
from baton.cli.options import settings_options
from baton.config import BadSetting, Settings

if TYPE_CHECKING:
    from baton.bench.client import Client

Endpoint = Literal["completions", "chat", "grpc"]


@click.command(short_help="Put load on a server and say how it did.")
@settings_options("client")
@click.option(
    "--endpoint", type=click.Choice(get_args(Endpoint)), default="completions", show_default=True,
    help="what the server is asked: OpenAI's HTTP, or baton's gRPC (--url HOST:PORT)",
)  # fmt: skip
@click.option("--model", help="model to ask for [the server's first]")
@click.option("--api-key", envvar="OPENAI_API_KEY", default="", help="[env OPENAI_API_KEY]")
@click.option("--label", default="", help="name in the report [the server's address]")
@click.option(
    "--peer", "peers", multiple=True, metavar="LABEL=URL[#MODEL]",
    help="another server that gets the same load after the first; may be repeated",
)  # fmt: skip
@load_options
@click.option("--text", is_flag=True, help="send words where token ids could be sent")
@click.option(
    "--ignore-eos/--no-ignore-eos", default=True, show_default=True,
    help="ask for full-length answers, in a field that some servers refuse",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(min=0), default=4, show_default=True, help="requests not counted"
)
@click.option("--timeout", type=POSITIVE, default=600.0, show_default=True, help="seconds per request")
@click.option("--price-per-hour", type=POSITIVE, help="of the whole server, in any currency")
@report_options
@click.option(
    "--compare", nargs=2, type=READ, metavar="A B",
    help="send nothing: put two files of --out side by side",
)  # fmt: skip
@click.option("--progress/--no-progress", default=True, help="a progress bar on a terminal")
def bench(settings: Settings, compare: tuple[Path, Path] | None, **given: Any) -> None:
    """Put load on an OpenAI-compatible server, or on baton's gRPC, and say how it did.

    Open loop (--request-rate, or a --trace's own times): requests are sent when they are due, however slow
    the server is, and latencies count from then. Closed loop (--concurrency): each is sent when one ends.
    """
    out, html = given["out"], given["html"]
    if html is not None:
        require("matplotlib")
    if compare is not None:
        found = side_by_side({_name(path, compare): load(path) for path in compare})
    else:
        if given["endpoint"] != "grpc":
            require("aiohttp")
        found = _measure(settings.client.url, given)
    write(found, out, html)


def _measure(url: str, given: dict[str, Any]) -> Result:
    servers = [Server(given["label"] or url.removeprefix("http://"), _client(url, given))]
    for peer in given["peers"]:
        label, _, address = peer.partition("=")
        if not label or not address:
            raise BadSetting(f"--peer {peer!r} is not LABEL=URL or LABEL=URL#MODEL")
        address, _, model = address.partition("#")
        servers.append(Server(label, _client(address, {**given, "model": model or given["model"]})))
    plan = Bench(
        load_of(given, warmup=given["warmup"], text=given["text"]),
        Targets(given["slo_ttft"], given["slo_tpot"]),
        given["price_per_hour"],
    )
    with _Bar(shown=given["progress"]) as bar:
        runs = run_bench(plan, servers, bar.begin)
    return result_of("bench", {"url": url, **given}, runs)


def _client(url: str, given: dict[str, Any]) -> Client:
    # Here, not above: aiohttp is of an extra.
    if given["endpoint"] == "grpc":
        from baton.bench.grpc_client import GrpcClient

        return GrpcClient(
            url,
            given["model"],
            api_key=given["api_key"],
            timeout_s=given["timeout"],
            ignore_eos=given["ignore_eos"],
        )
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
