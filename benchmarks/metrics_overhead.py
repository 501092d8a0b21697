"""What do metrics and traces cost? CPU per request of a router, and of a whole cluster per token.

    python benchmarks/metrics_overhead.py [--quick]

The same load, in rounds that alternate, on routers and clusters that differ in one thing: `off` counts
nothing (a sitecustomize makes every counter's method do nothing), `metrics` is as baton comes, scraped once a
second, `sampled` traces one request in a hundred besides, as is the default with a collector, and `traced`
traces all of them. Traces go to a collector in this process, whose CPU does not count.

- router: instant workers, 16 tokens per answer, so that what is left is the router; its CPU per request
- cluster: one hybrid worker and the bundled model, eight clients; CPU of router, worker and kvstore per token
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table
from router import MODEL, WORKERS, child, started, wait_answer
from router_load import put_load, serve_workers
from served import cpu_seconds, figure, print_report, random_tokens, stream

from baton.ports import unused_port
from tests.cluster import Cluster, run_cluster
from tests.otlp_collector import running_collector

CLIENTS = 8
PROMPT_TOKENS = 64
ANSWER_TOKENS = 64
_NOTHING_COUNTS = """
import prometheus_client
import baton.metrics
for kind, methods in {
    prometheus_client.Counter: ("inc",), prometheus_client.Gauge: ("inc", "dec", "set"),
    prometheus_client.Histogram: ("observe",), baton.metrics.Histogram: ("observe",),
}.items():
    for method in methods:
        setattr(kind, method, lambda self, *given, **named: None)
"""


@dataclass(frozen=True)
class Mode:
    """What a process is told beside its usual flags."""

    name: str
    environ: Mapping[str, str]
    scraped: bool


def modes(folder: Path, collector: str) -> list[Mode]:
    (folder / "sitecustomize.py").write_text(_NOTHING_COUNTS)
    here = str(Path(__file__).resolve().parent.parent)
    traced = {"BATON_OTLP_ENDPOINT": collector}
    return [
        Mode("off", {"PYTHONPATH": f"{folder}:{here}"}, scraped=False),
        Mode("metrics", {}, scraped=True),
        Mode("sampled", traced, scraped=True),
        Mode("traced", {**traced, "BATON_TRACE_SHARE": "1"}, scraped=True),
    ]


@contextmanager
def scraping(urls: Sequence[str]) -> Iterator[None]:
    """As Prometheus would, but once a second."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(1.0):
            for url in urls:
                urllib.request.urlopen(url, timeout=10).read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def router_round(stack: ExitStack, mode: Mode, folder: Path, requests: int) -> Callable[[], float]:
    """A router in that mode; each call loads it and gives its CPU seconds per request."""
    store_port, port, own_port = (unused_port("127.0.0.1") for _ in range(3))
    python = [sys.executable, "-m"]
    store = [*python, "services.kvstore", "--kvstore-port", str(store_port)]
    stack.enter_context(started(store, folder / f"{mode.name}-kvstore.log"))
    stack.enter_context(child(serve_workers, f"127.0.0.1:{store_port}", WORKERS, 0.0))
    flags = ["--port", str(port), "--grpc-port", "0", "--metrics-port", str(own_port)]
    flags += ["--kvstore", f"127.0.0.1:{store_port}", "--model", str(MODEL)]
    log = folder / f"{mode.name}-router.log"
    process = stack.enter_context(started([*python, "services.router", *flags], log, mode.environ))
    wait_answer(port, "/ready", process, log)

    def run() -> float:
        before_s = cpu_seconds(process.pid)
        with scraping([f"http://127.0.0.1:{own_port}/metrics"] if mode.scraped else []):
            uvloop.run(put_load(port, MODEL.name, clients=CLIENTS, requests=requests, tokens=16))
        return (cpu_seconds(process.pid) - before_s) / requests

    return run


def cluster_round(stack: ExitStack, mode: Mode, folder: Path, requests: int) -> Callable[[], float]:
    """A whole cluster in that mode; each call loads it and gives the CPU seconds of all of it per token."""
    home = folder / mode.name
    home.mkdir()
    cluster = stack.enter_context(run_cluster(home, "--hybrid", "1", environ=dict(mode.environ)))
    pages = [f"{cluster.own_url}/metrics", f"http://{cluster.status('hybrid-0').metrics_address}/metrics"]

    def run() -> float:
        pids = list(cluster.pids().values())
        before_s = sum(map(cpu_seconds, pids))
        with scraping(pages if mode.scraped else []):
            asyncio.run(_ask(cluster, requests))
        return (sum(map(cpu_seconds, pids)) - before_s) / (requests * ANSWER_TOKENS)

    return run


async def _ask(cluster: Cluster, requests: int) -> None:
    left = iter(range(requests))

    async def client() -> None:
        for number in left:
            prompt = random_tokens(PROMPT_TOKENS, random.Random(number))
            await stream(cluster.base_url, prompt, ANSWER_TOKENS)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CLIENTS):
            tasks.create_task(client())


def alternate(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each run gave in every round, the first one, which warms up, left out."""
    given: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in runs if number % 2 else reversed(runs):
            seconds = runs[name]()
            if number:
                given[name].append(seconds)
    return given


def over_off(given: Mapping[str, Sequence[float]], mode: str) -> float:
    """The median of what a mode took of what `off` took in the same round."""
    return statistics.median(one / off for one, off in zip(given[mode], given["off"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds, not 9, of fewer requests")
    quick = parser.parse_args().quick
    rounds = 3 if quick else 9
    measured: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch, running_collector() as collector:
        folder = Path(scratch)
        for part, start, requests in (
            ("router", router_round, 400 if quick else 1500),
            ("cluster", cluster_round, 16 if quick else 64),
        ):
            with ExitStack() as stack:
                runs = {
                    mode.name: start(stack, mode, folder, requests)
                    for mode in modes(folder, collector.endpoint)
                }
                measured[part] = alternate(runs, rounds)
    table = Table("", "off", "metrics", "sampled", "traced", title="CPU, us, and over off")
    for part, unit in (("router", "per request"), ("cluster", "per token")):
        given = measured[part]
        cells = [
            f"{1e6 * statistics.median(one):.0f} ({over_off(given, name):.3f})" for name, one in given.items()
        ]
        table.add_row(f"{part} {unit}", *cells)
    Console(file=sys.stdout, width=110).print(table)
    figures = [
        figure(
            f"{part}_cpu_{mode}_over_off", over_off(measured[part], mode), "ratio", at_most=1.02, peer="off"
        )
        for part in measured
        for mode in ("metrics", "sampled", "traced")
    ]
    print_report("metrics_overhead", figures)


if __name__ == "__main__":
    main()
