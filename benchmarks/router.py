"""What a router adds: latency, CPU per request and requests per second, baton's beside its peers'.

    python benchmarks/router.py [--quick] [--install] [--peer NAME=PYTHON] [--tokens 16] [--clients 1,32]

Workers answer at once, so that what is left is the router. baton's router is the real process, with a real
kvstore, in front of real gRPC decode workers; it parses, tokenizes, hashes and places every request. So does
Dynamo's frontend with its KV router, in front of instant workers of its own kind, found through files. The
other peers proxy HTTP to instant OpenAI servers and do less. The load is the same: streamed completions of a
2 KB prompt, no two alike, on keep-alive connections. Rounds of all routers alternate; medians are reported.

Latency is added to what the load generator sees of the instant OpenAI server without any router. CPU is that
of the router's processes, all of it, per request.

Peers run from their own environments: --peer names an interpreter that has one, --install makes them under
~/.cache/baton-benchmarks from PyPI.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import uvloop
from rich.console import Console
from rich.table import Table
from router_load import Load, put_load, serve_openai, serve_workers

from baton.ports import unused_port

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "baton-small"
CACHE = Path.home() / ".cache" / "baton-benchmarks"
WORKERS = 4
READY_S = 90.0
PACED_STEP_S = 0.05


@dataclass(frozen=True)
class Peer:
    """Another router: what pip installs, and the command that fronts `urls` on `port`.

    `workers` is the command of its own workers where it does not front `urls`; `environ` is for both, given a
    folder of its own. It is ready when `health` answers with `ready` in the body.
    """

    package: str
    command: Callable[[Path, int, Sequence[str], Path], list[str]]
    health: str = "/health"
    ready: bytes = b""
    install: Sequence[Sequence[str]] = ()
    workers: Callable[[Path], list[str]] | None = None
    environ: Callable[[Path], Mapping[str, str]] = lambda folder: {}


def _vllm_router(python: Path, port: int, urls: Sequence[str], folder: Path) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(unused_port("127.0.0.1"))]
    return [str(python.parent / "vllm-router"), *where, "--policy", "cache_aware", "--worker-urls", *urls]


def _smg(python: Path, port: int, urls: Sequence[str], folder: Path) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(unused_port("127.0.0.1"))]
    return [
        *(str(python.parent / "smg"), "launch", *where),
        *("--policy", "cache_aware", "--worker-urls", *urls),
    ]


def _litellm(python: Path, port: int, urls: Sequence[str], folder: Path) -> list[str]:
    models = [
        {
            "model_name": "m",
            "litellm_params": {"model": "text-completion-openai/m", "api_base": f"{url}/v1", "api_key": "x"},
        }
        for url in urls
    ]
    config = folder / "litellm.json"  # YAML is a superset of JSON
    config.write_text(json.dumps({"model_list": models}))
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [str(python.parent / "litellm"), *where, "--config", str(config), "--telemetry", "False"]


def _dynamo(python: Path, port: int, urls: Sequence[str], folder: Path) -> list[str]:
    flags = ["--http-port", str(port), "--router-mode", "kv", "--kv-cache-block-size", "16"]
    return [str(python), "-m", "dynamo.frontend", *flags]


def _dynamo_workers(python: Path) -> list[str]:
    script = Path(__file__).with_name("router_dynamo.py")
    return [str(python), str(script), str(MODEL), "m", str(WORKERS)]


def _dynamo_environ(folder: Path) -> Mapping[str, str]:
    planes = {"DYN_DISCOVERY_BACKEND": "file", "DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq"}
    return {**planes, "DYN_FILE_KV": str(folder / "dynamo"), "DYN_LOG": "warn"}


PEERS = {
    "dynamo": Peer(
        "ai-dynamo",
        _dynamo,
        "/v1/models",
        b'"m"',
        # One of what it declares is not on PyPI; this is what the frontend and the workers import.
        (
            ["--no-deps", "ai-dynamo==1.6.1", "ai-dynamo-runtime==1.6.1"],
            ["aiohttp", "kubernetes<33", "msgspec", "prometheus-client<1", "pydantic<2.14", "pyzmq"],
            ["redis<9", "tqdm", "transformers", "uvloop", "zstandard<1"],
        ),
        _dynamo_workers,
        _dynamo_environ,
    ),
    "vllm-router": Peer("vllm-router", _vllm_router),
    "smg": Peer("smg", _smg),
    "litellm": Peer(
        "litellm",
        _litellm,
        "/health/liveliness",
        install=(["litellm[proxy]"],),
        environ=lambda folder: {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"},
    ),
}


@dataclass(frozen=True)
class Running:
    """A router that serves; `process` is None for no router at all."""

    name: str
    port: int
    model: str
    process: psutil.Process | None

    def cpu_s(self) -> float:
        """CPU seconds its processes have used."""
        if self.process is None:
            return 0.0
        family = [self.process, *self.process.children(recursive=True)]
        return sum(one.cpu_times().user + one.cpu_times().system for one in family)


@dataclass(frozen=True)
class Measured:
    """One round of one router."""

    load: Load
    cpu_s: float

    @property
    def requests_per_s(self) -> float:
        return len(self.load.whole_s) / self.load.elapsed_s

    @property
    def cpu_us(self) -> float:
        return 1e6 * self.cpu_s / len(self.load.whole_s)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextmanager
def started(
    command: Sequence[str], log: Path, extra: Mapping[str, str] = MappingProxyType({})
) -> Iterator[psutil.Process]:
    """A process and its children, which end with the block."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    with log.open("wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, env={**environ, **extra}, stdout=said, stderr=said)
    whole = psutil.Process(process.pid)
    try:
        yield whole
    finally:
        family = [whole, *whole.children(recursive=True)] if whole.is_running() else []
        for one in family:
            one.kill()
        process.wait()


@contextmanager
def child(target: Callable[..., None], *arguments: object) -> Iterator[None]:
    """A process that runs `target` and has said that it serves."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        if not ours.poll(READY_S):
            raise TimeoutError(f"{target.__name__} does not serve after {READY_S:.0f} s")
        ours.recv()
        yield
    finally:
        process.kill()
        process.join()


def wait_answer(port: int, path: str, process: psutil.Process, log: Path, ready: bytes = b"") -> None:
    """Until `path` answers with `ready` in the body."""
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
                if ready in answer.read():
                    return
                raise OSError(f"{path} answers without {ready!r}")
        except OSError as error:
            dead = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
            if dead or time.monotonic() > deadline_s:
                raise RuntimeError(f"not ready: {error}; {log.read_text()[-300:]}") from error
        time.sleep(0.1)


@contextmanager
def baton_router(folder: Path, step_s: float) -> Iterator[Running]:
    """A kvstore, instant workers and a router."""
    store_port, port = unused_port("127.0.0.1"), unused_port("127.0.0.1")
    store = f"127.0.0.1:{store_port}"
    python = [sys.executable, "-m"]
    with ExitStack() as stack:
        flags = ["--kvstore-port", str(store_port)]
        stack.enter_context(started([*python, "services.kvstore", *flags], folder / "kvstore.log"))
        stack.enter_context(child(serve_workers, store, WORKERS, step_s))
        flags = ["--port", str(port), "--grpc-port", "0", "--kvstore", store, "--model", str(MODEL)]
        log = folder / "router.log"
        process = stack.enter_context(started([*python, "services.router", *flags], log))
        wait_answer(port, "/ready", process, log)
        yield Running("baton", port, MODEL.name, process)


@contextmanager
def peer_router(name: str, python: Path, urls: Sequence[str], folder: Path) -> Iterator[Running]:
    port, log = unused_port("127.0.0.1"), folder / f"{name}.log"
    peer = PEERS[name]
    environ = peer.environ(folder)
    with ExitStack() as stack:
        if peer.workers is not None:
            stack.enter_context(started(peer.workers(python), folder / f"{name}-workers.log", environ))
        command = peer.command(python, port, urls, folder)
        process = stack.enter_context(started(command, log, environ))
        wait_answer(port, peer.health, process, log, peer.ready)
        yield Running(name, port, "m", process)


def measure(router: Running, *, clients: int, requests: int, tokens: int) -> Measured:
    before_s = router.cpu_s()
    load = uvloop.run(put_load(router.port, router.model, clients=clients, requests=requests, tokens=tokens))
    return Measured(load, router.cpu_s() - before_s)


def find_peers(given: Sequence[str], install: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """Interpreters of the peers there are, and why there is none for the others."""
    found, missing = {}, {}
    named = dict(item.split("=", 1) for item in given)
    for name, peer in PEERS.items():
        python = Path(named.get(name, CACHE / name / "bin" / "python"))
        if not python.exists() and install:
            subprocess.run([sys.executable, "-m", "venv", str(CACHE / name)], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet"]
            steps = peer.install or ([peer.package],)
            if any(subprocess.run([*pip, *step]).returncode for step in steps):
                shutil.rmtree(CACHE / name)
                missing[name] = f"pip install {peer.package} failed"
                continue
        if python.exists():
            found[name] = python
        else:
            missing[name] = f"not installed at {python}; --install, or --peer {name}=PYTHON"
    return found, missing


def version_of(package: str, python: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests and rounds")
    parser.add_argument("--install", action="store_true", help="install peers that are not there, from PyPI")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="where a peer is")
    parser.add_argument("--tokens", default="16,128", help="lengths of the streams (16,128)")
    parser.add_argument("--clients", help="numbers of clients (1,32,256)")
    arguments = parser.parse_args()
    found, missing = find_peers(arguments.peer, arguments.install)
    rounds = 2 if arguments.quick else 5
    cases = [
        (int(tokens), int(clients))
        for tokens in arguments.tokens.split(",")
        for clients in (arguments.clients or "1,32,256").split(",")
    ]
    if arguments.quick and not arguments.clients:
        cases = [(16, 1), (16, 32), (128, 32)]

    results: dict[tuple[str, int, int], list[Measured]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        backends = [unused_port("127.0.0.1") for _ in range(WORKERS)]
        stack.enter_context(child(serve_openai, backends))
        routers = [
            Running("none", backends[0], "m", None),
            stack.enter_context(baton_router(folder, 0.0)),
        ]
        for name, python in found.items():
            try:
                urls = [f"http://127.0.0.1:{port}" for port in backends]
                routers.append(stack.enter_context(peer_router(name, python, urls, folder)))
                measure(routers[-1], clients=1, requests=2, tokens=16)
            except (RuntimeError, OSError, ExceptionGroup) as error:
                routers = [router for router in routers if router.name != name]
                missing[name] = f"does not serve: {error}"[:300]
        for _ in range(rounds):
            for tokens, clients in cases:
                for router in routers:
                    requests = _requests(router.name, tokens, clients, arguments.quick)
                    done = measure(router, clients=clients, requests=requests, tokens=tokens)
                    results.setdefault((router.name, tokens, clients), []).append(done)
        versions = {name: version_of(PEERS[name].package, python) for name, python in found.items()}

    with tempfile.TemporaryDirectory() as scratch, baton_router(Path(scratch), PACED_STEP_S) as router:
        paced = measure(router, clients=256, requests=512 if arguments.quick else 2048, tokens=32)
    report(results, paced, versions, missing, cases)


def _requests(name: str, tokens: int, clients: int, quick: bool) -> int:
    base = max(100, 2 * clients) if quick else max(300, 8 * clients)
    if tokens > 16:
        base = max(2 * clients, base // 4)
    return max(clients, base // 8) if name == "litellm" else base


def median(rounds: Sequence[Measured], value: Callable[[Measured], float]) -> float:
    return statistics.median(value(one) for one in rounds)


def p50_ms(one: Measured) -> float:
    return 1e3 * quantile(one.load.whole_s, 0.5)


def p99_ms(one: Measured) -> float:
    return 1e3 * quantile(one.load.whole_s, 0.99)


def report(
    results: dict[tuple[str, int, int], list[Measured]],
    paced: Measured,
    versions: dict[str, str],
    missing: dict[str, str],
    cases: Sequence[tuple[int, int]],
) -> None:
    console = Console(width=110)
    figures: list[dict[str, Any]] = []

    def figure(name: str, value: float | None, unit: str, **more: object) -> None:
        figures.append(
            {"figure": name, "value": None if value is None else round(value, 4), "unit": unit, **more}
        )

    table = Table(*("tokens", "clients", "router", "added p50 ms", "added p99 ms", "requests/s", "CPU us"))
    for tokens, clients in cases:
        direct = results["none", tokens, clients]
        for (name, *case), rounds in results.items():
            if case != [tokens, clients]:
                continue
            added50 = median(rounds, p50_ms) - median(direct, p50_ms)
            added99 = median(rounds, p99_ms) - median(direct, p99_ms)
            speed, cpu = (
                median(rounds, lambda one: one.requests_per_s),
                median(rounds, lambda one: one.cpu_us),
            )
            table.add_row(
                *(str(tokens), str(clients), name, f"{added50:.2f}", f"{added99:.2f}"),
                *(f"{speed:.0f}", f"{cpu:.0f}" if name != "none" else ""),
            )
            if name == "none":
                continue
            of = f"{name}_{tokens}_tokens_{clients}_clients"
            peer = {} if name == "baton" else {"peer": f"{name} {versions[name]}"}
            goals: dict[str, dict[str, object]] = {"added": {}, "cpu": {}}
            if name == "baton" and tokens == 16:
                goals["cpu"] = {"goal": "<= 800", "met": cpu <= 800}
                if clients == 1:
                    goals["added"] = {"goal": "<= 1.0", "met": added50 <= 1.0}
                elif theirs := results.get(("dynamo", tokens, clients)):
                    ratio = speed / median(theirs, lambda one: one.requests_per_s)
                    peer_name = f"ai-dynamo {versions['dynamo']}"
                    more = {"goal": ">= 3.0", "met": ratio >= 3.0, "peer": peer_name}
                    figure(
                        f"requests_per_s_vs_dynamo_{tokens}_tokens_{clients}_clients", ratio, "ratio", **more
                    )
            figure(f"added_p50_{of}", added50, "ms", **peer, **goals["added"])
            figure(f"added_p99_{of}", added99, "ms", **peer)
            figure(f"requests_per_s_{of}", speed, "1/s", **peer)
            figure(f"cpu_{of}", cpu, "us/request", **peer, **goals["cpu"])
    console.print(table)

    if alone := results.get(("baton", 16, 1)):
        stalls = sum(value >= 0.04 for one in alone for value in one.load.whole_s)
        asked = sum(len(one.load.whole_s) for one in alone)
        console.print(f"requests of 40 ms and more on one keep-alive connection: {stalls} of {asked}")
        figure("stalls_of_40_ms", stalls, f"of {asked} requests", goal="0", met=stalls == 0)

    gaps = paced.load.gaps_s
    late_ms = 1e3 * (quantile(gaps, 0.99) - PACED_STEP_S)
    console.print(
        f"256 streams paced at {1e3 * PACED_STEP_S:.0f} ms: gap p50 {1e3 * quantile(gaps, 0.5):.1f} ms, "
        f"p99 {1e3 * quantile(gaps, 0.99):.1f} ms; CPU per request of 32 tokens {paced.cpu_us:.0f} us"
    )
    figure("paced_256_gap_p99_beyond_pace", late_ms, "ms", goal="<= 25", met=late_ms <= 25)
    for name, reason in missing.items():
        console.print(f"{name}: {reason}")
        figure(f"cpu_{name}", None, "us/request", peer=name, reason=reason)
    device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    versions = {"python": platform.python_version(), **versions}
    print(json.dumps({"benchmark": "router", "device": device, "versions": versions, "figures": figures}))


if __name__ == "__main__":
    main()
