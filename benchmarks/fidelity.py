"""Does the simulator say what a real cluster does? The same load on both, side by side.

    python benchmarks/fidelity.py [--quick] [--html report.html]

`baton profile` measures the steps of a model on this machine; `baton up` runs a cluster of the same model
here; `baton bench` puts a load on it, open loop; and the same requests go through `baton.sim` with that
profile. The profile is the mean of one before the load and one after it, because machines with other work
change. It is of a worker's engine alone. What serving adds (the worker's event loop, which takes turns with
the engine, gRPC, the router, and cores that wake from sleep) is measured on the cluster before the load, with
one request at a time: by how much first tokens, and the tokens after them, come later than the simulator says
of the same requests. Nothing is fitted to the load's run.

The figures are the simulator's over the cluster's. The goal is to be within 15 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec
from rich.console import Console

from baton import __version__
from baton.bench.html import page
from baton.bench.load import Synthetic, cut, timed
from baton.bench.result import Result, Run, load, run_of
from baton.bench.summary import Latency, Summary
from baton.bench.table import table
from baton.bench.trace import TraceRow
from baton.config import EngineSettings
from baton.profile import DecodePoint, PrefillPoint, Profile
from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.profiles import measured
from baton.sim.simulator import simulate
from baton.sim.workload import from_trace

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "baton-small"
BATON = (sys.executable, "-m", "baton.cli.main")
BLOCK_TOKENS = 16
KV_BYTES_PER_TOKEN = 6 * 2 * 4 * 32 * 4  # layers, keys and values, heads, their size, float32
READ_BYTES_PER_S = 5e9
BATCH_TOKENS = 512
KV_BYTES = 1 << 30
WORKER = (
    *("--model", str(MODEL), "--max-model-len", "1024", "--threads", "1"),
    *("--max-batch-tokens", str(BATCH_TOKENS), "--kv-bytes", str(KV_BYTES)),
)
ALONE = 40
ALONE_EVERY_S = 2.0
READY_S = 120.0
SEED = 11


@dataclass(frozen=True)
class Shape:
    """The cluster and its load; lengths in tokens."""

    roles: tuple[Role, ...]
    rate_per_s: float
    input_tokens: int
    output_tokens: int
    spread: float = 0.5


SHAPES = {
    "1 hybrid": Shape((Role.HYBRID,), 2.0, 192, 48),
    "1 prefill + 1 decode": Shape((Role.PREFILL, Role.DECODE), 2.0, 192, 48),
}


def main() -> None:
    arguments = _arguments()
    console = Console(width=100)
    figures, runs = [], []
    with tempfile.TemporaryDirectory(prefix="baton-fidelity-") as folder:
        before = profile(Path(folder))
        for name, shape in SHAPES.items():
            alone, real = measure(shape, arguments.seconds / len(SHAPES), Path(folder))
            after = profile(Path(folder))
            steps = mean(before, after)
            before = after
            modelled_alone = model(shape, asked_alone(shape), steps)
            added = [
                max(0.0, _seconds(real_s, "p50") - _seconds(modelled_s, "p50"))
                for real_s, modelled_s in (
                    (alone.summary.ttft, modelled_alone.summary.ttft),
                    (alone.summary.tpot, modelled_alone.summary.tpot),
                )
            ]
            console.print(f"serving adds {1e3 * added[0]:.2f} ms to a prompt, {1e3 * added[1]:.2f} to a step")
            modelled = model(shape, asked(shape, arguments.seconds / len(SHAPES)), served(steps, *added))
            pair = [_named(f"{name}: cluster", real), _named(f"{name}: simulated", modelled)]
            console.print(table(pair))
            runs += pair
            figures += compare(name, real.summary, modelled.summary)
    result = Result("fidelity", time.strftime("%Y-%m-%d"), {"baton": __version__}, {}, runs)
    arguments.html.write_text(page(result))
    console.print(f"side by side: {arguments.html}")
    report = {
        "benchmark": "fidelity",
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"baton": __version__, "python": platform.python_version()},
        "figures": figures,
    }
    print(json.dumps(report))


def profile(folder: Path) -> Profile:
    """What `baton profile` says of the model, with the threads that a worker has."""
    out = folder / "profile.json"
    run(*BATON, "profile", *WORKER, "--out", str(out))
    return msgspec.json.decode(out.read_bytes(), type=Profile)


def mean(one: Profile, other: Profile) -> Profile:
    """The steps that both have, each as long as the mean of the two."""
    prompts = {point.tokens: point.seconds for point in other.prefill}
    steps = {(step.batch, step.context): step.seconds for step in other.decode}
    return msgspec.structs.replace(
        one,
        prefill=[
            PrefillPoint(point.tokens, (point.seconds + prompts[point.tokens]) / 2)
            for point in one.prefill
            if point.tokens in prompts
        ],
        decode=[
            DecodePoint(step.batch, step.context, (step.seconds + steps[step.batch, step.context]) / 2)
            for step in one.decode
            if (step.batch, step.context) in steps
        ],
    )


def served(profile: Profile, prompt_s: float, step_s: float) -> Profile:
    """The steps of a worker that serves: so much longer with a prompt, and without."""
    return msgspec.structs.replace(
        profile,
        prefill=[PrefillPoint(point.tokens, point.seconds + prompt_s) for point in profile.prefill],
        decode=[DecodePoint(step.batch, step.context, step.seconds + step_s) for step in profile.decode],
    )


def measure(shape: Shape, seconds: float, folder: Path) -> tuple[Run, Run]:
    """On a real cluster: one request at a time, then the load."""
    out = folder / "real.json"
    with cluster(shape.roles, folder) as url:
        bench = (
            *(*BATON, "bench", "--url", url, "--seed", str(SEED), "--out", str(out), "--warmup", "8"),
            *("--input-len", str(shape.input_tokens), "--output-len", str(shape.output_tokens)),
            *("--range-ratio", str(shape.spread)),
        )
        run(*bench, "--concurrency", "1", "--num-prompts", str(ALONE))
        alone = load(out).runs[0]
        run(*bench, "--request-rate", str(shape.rate_per_s), "--duration", str(seconds))
        return alone, load(out).runs[0]


def asked(shape: Shape, seconds: float) -> list[TraceRow]:
    """The load, drawn as `baton bench` draws it."""
    return cut(timed(drawn(shape), "poisson", shape.rate_per_s, Random(SEED + 1)), None, seconds)


def asked_alone(shape: Shape) -> list[TraceRow]:
    """Requests so far apart that each is alone."""
    return cut(timed(drawn(shape), "constant", 1 / ALONE_EVERY_S, Random(0)), ALONE, None)


def drawn(shape: Shape) -> Iterator[TraceRow]:
    made = Synthetic(shape.input_tokens, shape.output_tokens, spread=shape.spread)
    return made.rows(Random(SEED))


def model(shape: Shape, rows: list[TraceRow], steps: Profile) -> Run:
    """The requests in the simulator."""
    worker = WorkerSpec(
        Role.HYBRID,
        measured(steps),
        kv_blocks=KV_BYTES // (BLOCK_TOKENS * KV_BYTES_PER_TOKEN),
        max_batch_tokens=BATCH_TOKENS,
        max_batch_requests=EngineSettings().max_batch_requests,
        network_bytes_per_s=READ_BYTES_PER_S,
    )
    simulated = SimCluster(
        workers=tuple(_with_role(worker, role) for role in shape.roles),
        block_tokens=BLOCK_TOKENS,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
    )
    report = simulate(simulated, from_trace(rows, BLOCK_TOKENS))
    return run_of("simulated", "the same", shape.rate_per_s, report.records, report.summary)


def compare(name: str, real: Summary, modelled: Summary) -> list[dict[str, object]]:
    """The simulator's figures over the cluster's."""
    pairs = {
        "output_tokens_per_s": (modelled.output_tokens_per_s, real.output_tokens_per_s),
        **{
            f"{field}_{percentile}": (
                _seconds(getattr(modelled, field), percentile),
                _seconds(getattr(real, field), percentile),
            )
            for field in ("ttft", "tpot")
            for percentile in ("p50", "p90")
        },
    }
    where = name.replace(" + ", "_").replace(" ", "_")
    return [
        {
            "figure": f"{where}_{figure}_simulated_over_real",
            "value": round(simulated / measured, 3),
            "unit": "ratio",
            "goal": "0.85 to 1.15",
            "met": 0.85 <= simulated / measured <= 1.15,
            "peer": "the real cluster",
        }
        for figure, (simulated, measured) in pairs.items()
    ]


@contextlib.contextmanager
def cluster(roles: tuple[Role, ...], folder: Path) -> Iterator[str]:
    """A cluster on this machine; its URL."""
    counts = [arg for role in Role for arg in (f"--{role.value}", str(roles.count(role)))]
    log = folder / "up.log"
    command = [*BATON, "up", *WORKER, "--port", "0", "--grpc-port", "0"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *counts], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        deadline_s = time.monotonic() + READY_S
        while "Ctrl-C stops everything" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"the cluster did not start:\n{log.read_text()}")
            time.sleep(0.2)
        found = re.search(r"(http://\S+)", log.read_text())
        assert found is not None
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def run(*command: str) -> None:
    """Run a command to its end, silently if all is well."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _with_role(worker: WorkerSpec, role: Role) -> WorkerSpec:
    return WorkerSpec(**{**vars(worker), "role": role})


def _named(label: str, run: Run) -> Run:
    return Run(label, run.load, run.rate, run.summary, run.requests, run.itl)


def _seconds(latency: Latency | None, percentile: str) -> float:
    seconds = None if latency is None else getattr(latency, percentile)
    return float("inf") if seconds is None else float(seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="of load in all [300]")
    parser.add_argument("--html", type=Path, default=Path("fidelity.html"), help="[fidelity.html]")
    parser.add_argument("--quick", action="store_true", help="45 seconds of load")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds = 45.0
    return arguments


if __name__ == "__main__":
    main()
