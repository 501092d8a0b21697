"""What of the engine's decode speed is left through the running cluster, and where the rest goes.

    python benchmarks/cluster_efficiency.py [--quick] [--threads N ...]

The engine alone decodes a batch of 32 in a process of its own (see engine_subjects.py). Then the same model,
with as many threads, is one hybrid worker of `baton up`, and 32 clients stream over HTTP. Both are loaded all
the time and take turns; only steps in which all 32 decode count. Engine, event loops and client share the
machine's cores, so CPU time is shown per process: what the others use, an engine on all cores does not get.

In a worker, the first thread is its event loop (gRPC, sessions) and the rest the engine. In the router, text
and events are replayed in this process to learn what they take; what remains of it is gRPC, HTTP and asyncio.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import uvloop
from engine import SHAPES, Engine
from engine_subjects import DECODE_CONTEXT
from rich.console import Console
from rich.table import Table
from served import (
    Figure,
    cpu_seconds,
    figure,
    main_thread_cpu_seconds,
    print_report,
    random_tokens,
    served_folder,
    stream,
)

from baton.openai.answer import Head, Piece
from baton.openai.completions import CompletionShapes, EchoedPrompt
from baton.openai.logprobs import LogprobShapes
from baton.openai.schema import CompletionRequest
from baton.text import ChoiceText, Detokenizer, Tokenizer
from tests.cluster import Cluster, run_cluster

STREAMS = 32
GOAL = 0.9
MODEL = SHAPES["250m"]
PARTS = ("engine", "worker's event loop", "router: detokenize", "router: SSE", "router: gRPC, HTTP", "client")


@dataclass(frozen=True)
class Cpu:
    """CPU seconds used so far."""

    worker: float
    worker_loop: float
    router: float
    client: float

    @classmethod
    def now(cls, pids: dict[str, int]) -> Cpu:
        worker = pids["hybrid-0"]
        return cls(
            cpu_seconds(worker),
            main_thread_cpu_seconds(worker),
            cpu_seconds(pids["router"]),
            time.process_time(),
        )


@dataclass(frozen=True)
class Round:
    """A stretch in which all streams decode: tokens per second, and CPU seconds per token by `PARTS`."""

    tokens_per_s: float
    cpu_s: dict[str, float]


async def stream_all(
    cluster: Cluster, tokens: int, draw: random.Random, text_s: float, sse_s: float
) -> Round:
    """One round; `text_s` and `sse_s` are what the router spends per token on text and on events."""
    pids = cluster.pids()
    marks: list[tuple[float, Cpu]] = []
    begun = count = 0

    def heard(number: int) -> None:
        nonlocal begun, count
        begun += number == 0
        count += len(marks) == 1
        if (number == 0 and begun == STREAMS) or (number == tokens - 1 and len(marks) == 1):
            marks.append((time.monotonic(), Cpu.now(pids)))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(STREAMS):
            prompt = random_tokens(DECODE_CONTEXT, draw)
            tasks.create_task(stream(cluster.base_url, prompt, tokens, heard=heard))
    (began_s, before), (ended_s, after) = marks
    loop_s = after.worker_loop - before.worker_loop
    router_s = after.router - before.router
    spent = (
        after.worker - before.worker - loop_s,
        loop_s,
        count * text_s,
        count * sse_s,
        router_s - count * (text_s + sse_s),
        after.client - before.client,
    )
    shares = dict(zip(PARTS, (seconds / count for seconds in spent), strict=True))
    return Round(count / (ended_s - began_s), shares)


def replay(folder: Path) -> tuple[float, float]:
    """CPU seconds per token of turning tokens into text, and of shaping their events."""
    tokenizer, draw, tokens = Tokenizer.load(folder), random.Random(0), 20_000
    ids = [draw.randrange(MODEL.vocab) for _ in range(tokens)]
    detokenizer = Detokenizer.create(tokenizer, [], skip_special_tokens=True)
    text = ChoiceText(detokenizer, stops=[], include_stop=False, min_tokens=0)
    started = time.process_time()
    deltas = [text.push([token_id]) for token_id in ids]
    text_s = (time.process_time() - started) / tokens
    request = CompletionRequest(prompt=[1])
    names = LogprobShapes(tokenizer, as_token_ids=False)
    shapes = CompletionShapes(request, [EchoedPrompt("", [1])], Head("cmpl-0", 0, "m", "f"), names)
    started = time.process_time()
    for delta in deltas:
        shapes.chunk(0, Piece(delta, False), None)
    return text_s, (time.process_time() - started) / tokens


def measure(folder: Path, threads: int, steps: int, rounds: int) -> tuple[list[float], list[Round]]:
    """Tokens per second of the engine alone, and the cluster's rounds."""
    alone, through = [], []
    draw = random.Random(0)
    text_s, sse_s = replay(folder)
    flags = ["--hybrid", "1", "--threads", str(threads), "--dtype", "bfloat16"]
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        cluster = stack.enter_context(run_cluster(Path(scratch), *flags, model=folder))
        engine = stack.enter_context(Engine("baton", sys.executable, MODEL, "bfloat16", "cpu", threads))
        engine.ready()
        for number in range(rounds + 1):  # the first round warms up
            step_s = engine.ask(decode=STREAMS, steps=steps)
            done = uvloop.run(stream_all(cluster, steps + 1, draw, text_s, sse_s))
            if number:
                alone.append(STREAMS / step_s)
                through.append(done)
    return alone, through


def show(console: Console, threads: int, alone: list[float], through: list[Round]) -> list[Figure]:
    engine, cluster = median(alone), median(one.tokens_per_s for one in through)
    efficiency = median(one.tokens_per_s / speed for one, speed in zip(through, alone, strict=True))
    cpu_s = {part: median(one.cpu_s[part] for one in through) for part in PARTS}
    step_s = STREAMS / cluster
    table = Table(title=f"{STREAMS} streams, engine with {threads} of {os.cpu_count()} cores")
    for column in ("CPU", "us per token", "ms per step", "cores"):
        table.add_column(column, justify="right" if column != "CPU" else "left")
    for part, seconds in cpu_s.items():
        each_step = STREAMS * seconds
        table.add_row(part, f"{1e6 * seconds:.0f}", f"{1e3 * each_step:.2f}", f"{each_step / step_s:.2f}")
    console.print(table)
    console.print(
        f"engine alone {engine:.0f} tokens/s, {1e3 * STREAMS / engine:.1f} ms per step; through the cluster "
        f"{cluster:.0f} tokens/s, {1e3 * step_s:.1f} ms per step: {efficiency:.3f}"
    )
    name = f"decode_{STREAMS}_streams_{threads}_threads"
    return [
        figure(f"{name}_engine", engine, "tokens/s"),
        figure(f"{name}_cluster", cluster, "tokens/s"),
        figure(f"{name}_vs_engine", efficiency, "ratio", at_least=GOAL, peer="the engine alone"),
        *(figure(f"{name}_cpu_{part}", 1e6 * cpu_s[part], "us/token") for part in PARTS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short rounds on all cores but one")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="of the engine, each in turn")
    arguments = parser.parse_args()
    fewer = max(1, cores - 1)
    cases = arguments.threads or ([fewer] if arguments.quick else sorted({fewer, cores}))
    steps, rounds = (64, 2) if arguments.quick else (128, 5)
    folder, console, figures = served_folder(MODEL), Console(), []
    for threads in cases:
        figures += show(console, threads, *measure(folder, threads, steps, rounds))
    print_report("cluster_efficiency", figures)


if __name__ == "__main__":
    main()
