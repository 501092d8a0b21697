"""`baton top`: the cluster in a terminal, as the page at /ui shows it."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.cluster_now import ClusterNow, Percentiles, WorkerNow

_TIMEOUT_S = 5.0
_BAR = 16
_ROLE_STYLES = {"prefill": "yellow", "decode": "blue", "hybrid": "magenta"}


@dataclass(frozen=True)
class Rates:
    """Between two looks: tokens per second, and bytes per second by who reads from whom."""

    tokens: float
    flows: dict[tuple[str, str], float]

    @classmethod
    def between(cls, before: ClusterNow | None, now: ClusterNow) -> Rates:
        if before is None or now.time_s <= before.time_s:
            return cls(0.0, {})
        passed_s = now.time_s - before.time_s
        old = {(flow.source, flow.target): flow.bytes for flow in before.flows}
        moved = {
            (flow.source, flow.target): (flow.bytes - old.get((flow.source, flow.target), 0)) / passed_s
            for flow in now.flows
        }
        tokens = (now.requests.output_tokens - before.requests.output_tokens) / passed_s
        return cls(max(0.0, tokens), {pair: rate for pair, rate in moved.items() if rate > 0})


@click.command(short_help="Show a running cluster, live.")
@click.argument("address", metavar="HOST:PORT")
@click.option("--every-s", default=1.0, show_default=True, help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Print what is now and end.")
def top(address: str, every_s: float, once: bool) -> None:
    """Show the cluster: its workers, their load, and how requests are doing.

    HOST:PORT is the port that a router has for itself; `baton up` prints it beside (metrics).
    """
    console = Console()
    looks = _looks(address, every_s)
    shown = next(looks)
    if once:
        console.print(shown)
        return
    with Live(shown, console=console, screen=console.is_terminal, auto_refresh=False) as live:
        try:
            for shown in looks:
                live.update(shown, refresh=True)
        except KeyboardInterrupt:
            return


def fetch(address: str) -> ClusterNow:
    """What the router says now.

    Raises:
        ClickException: it cannot be asked.
    """
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
        connection.request("GET", "/ui/state")
        response = connection.getresponse()
        body = response.read()
        connection.close()
        if response.status != 200:
            raise click.ClickException(f"{address} has no /ui/state; give the router's own port")
        return msgspec.json.decode(body, type=ClusterNow)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise click.ClickException(f"cannot ask {address}: {error}") from error


def _looks(address: str, every_s: float) -> Iterator[Group]:
    before: ClusterNow | None = None
    while True:
        now = fetch(address)
        yield render(now, Rates.between(before, now))
        before = now
        time.sleep(every_s)


def render(now: ClusterNow, rates: Rates) -> Group:
    """The cluster as tables."""
    return Group(_head(now, rates), Text(), _workers(now), *_flows(rates), Text(), _latest(now))


def _head(now: ClusterNow, rates: Rates) -> Group:
    ended = sum(each.ended for each in now.goodput.values())
    good = sum(each.good for each in now.goodput.values())
    title = Text.assemble(("baton ", "bold"), now.model, ("  policy ", "dim"), now.policy)
    if not now.kvstore_connected:
        title.append("  no kvstore", "bold red")
    latency = Table.grid(padding=(0, 3))
    latency.add_row(
        f"first token {_percentiles(now.latency.ttft)}", f"per token {_percentiles(now.latency.tpot)}"
    )
    traffic = Table.grid(padding=(0, 3))
    traffic.add_row(
        f"{rates.tokens:.0f} tokens/s",
        f"{now.requests.running} running, {now.requests.waiting} waiting",
        f"goodput {good / ended:.0%}" if ended else "goodput –",
    )
    return Group(title, latency, traffic)


def _workers(now: ClusterNow) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "role", "KV", "running", "waiting", "queued", "free blocks", ""):
        right = name in ("running", "waiting", "queued", "free blocks")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for worker in now.workers:
        table.add_row(
            worker.id,
            Text(worker.role, _ROLE_STYLES.get(worker.role, "")),
            _bar(worker),
            str(worker.running),
            str(worker.waiting),
            str(worker.queued_tokens),
            str(worker.free_blocks),
            Text(_condition(worker), "red"),
        )
    return table


def _bar(worker: WorkerNow) -> Text:
    """How full the pool is: in use, kept for reuse, empty."""
    total = max(1, worker.total_blocks)
    used = round(_BAR * (total - worker.free_blocks) / total)
    kept = max(0, min(_BAR - used, round(_BAR * worker.cached_blocks / total) - used))
    style = _ROLE_STYLES.get(worker.role, "")
    return Text.assemble(("█" * used, style), ("▒" * kept, style), ("·" * (_BAR - used - kept), "dim"))


def _condition(worker: WorkerNow) -> str:
    if worker.draining:
        return "draining"
    if worker.avoided:
        return "avoided"
    return "" if worker.usable else "connecting"


def _flows(rates: Rates) -> list[Text]:
    return [
        Text(f"KV {source} → {target}  {rate / 1e6:.1f} MB/s", "cyan")
        for (source, target), rate in sorted(rates.flows.items())
    ]


def _latest(now: ClusterNow) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("request", "prompt", "prefill", "decode", "first token", "per token", "tokens", "end"):
        table.add_column(name)
    for choice in now.recent:
        table.add_row(
            choice.request_id[:8],
            str(choice.prompt_tokens),
            choice.prefill,
            choice.decode_worker,
            _seconds(choice.ttft_s),
            _seconds(choice.tpot_s),
            str(choice.output_tokens),
            choice.outcome,
        )
    return table


def _percentiles(values: Percentiles | None) -> str:
    return "–" if values is None else f"{_seconds(values.p50)} (p99 {_seconds(values.p99)})"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
