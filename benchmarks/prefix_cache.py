"""How much sooner the first token comes when a long shared prefix is cached.

    python benchmarks/prefix_cache.py [--quick]

Starts `baton up` with one hybrid worker and the bundled model. Each round sends a prompt whose 8 k tokens no
request has had before (cold), then prompts that share them and end in a question of their own (cached). TTFT
is what a client sees: from sending the HTTP request to the first streamed token. Requests go one at a time.
The cached blocks themselves are checked by the header that counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cluster import run_cluster

PREFIX_TOKENS = 8192
QUESTION_TOKENS = 32
CACHED_PER_ROUND = 3
GOAL = 0.9


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token, and how many prompt tokens came from the cache."""

    ttft_s: float
    cached_tokens: int


def tokens(count: int, draw: random.Random) -> list[int]:
    return [draw.randrange(100, 4000) for _ in range(count)]


def ask(client: httpx.Client, prompt: list[int]) -> Answer:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"the cluster answered {response.status_code}: {response.read()!r}")
        lines = response.iter_lines()
        if not next(lines, "").startswith("data: "):
            raise RuntimeError("the stream ended without a token")
        ttft_s = time.perf_counter() - started
        for _ in lines:
            pass
        return Answer(ttft_s, int(response.headers["x-baton-cached-tokens"]))


def measure(rounds: int) -> tuple[list[Answer], list[Answer]]:
    """Cold answers, one per round, and cached ones."""
    draw = random.Random(0)
    cold: list[Answer] = []
    cached: list[Answer] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        run_cluster(Path(folder), "--hybrid", "1") as cluster,
        httpx.Client(base_url=cluster.base_url, timeout=300) as client,
    ):
        ask(client, tokens(600, draw))  # what the process does once is done once
        for _ in range(rounds):
            prefix = tokens(PREFIX_TOKENS, draw)
            cold.append(ask(client, prefix + tokens(QUESTION_TOKENS, draw)))
            for _ in range(CACHED_PER_ROUND):
                cached.append(ask(client, prefix + tokens(QUESTION_TOKENS, draw)))
    return cold, cached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds, under a minute")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 7
    cold, cached = measure(rounds)
    wrong = [answer for answer in cold if answer.cached_tokens] + [
        answer for answer in cached if answer.cached_tokens != PREFIX_TOKENS
    ]
    if wrong:
        raise SystemExit(f"not what was to be measured: {wrong}")
    before = statistics.median(answer.ttft_s for answer in cold)
    after = statistics.median(answer.ttft_s for answer in cached)
    cut = 1 - after / before
    table = Table(title=f"{PREFIX_TOKENS} shared tokens and {QUESTION_TOKENS} of its own, {rounds} rounds")
    for column in ("", "median TTFT", "fastest", "slowest"):
        table.add_column(column, justify="right")
    for name, answers in (("cold", cold), ("cached", cached)):
        seconds = [answer.ttft_s for answer in answers]
        table.add_row(
            name,
            *(f"{value * 1e3:.1f} ms" for value in (statistics.median(seconds), min(seconds), max(seconds))),
        )
    Console().print(table)
    print(f"TTFT falls by {cut:.1%}")
    figures = [
        {
            "figure": "ttft_cold",
            "value": round(before, 5),
            "unit": "s",
            "goal": None,
            "met": None,
            "peer": None,
        },
        {
            "figure": "ttft_cached",
            "value": round(after, 5),
            "unit": "s",
            "goal": None,
            "met": None,
            "peer": None,
        },
        {
            "figure": "ttft_cut",
            "value": round(cut, 4),
            "unit": "ratio",
            "goal": f">= {GOAL}",
            "met": cut >= GOAL,
            "peer": "the same cluster, prefix not cached",
        },
    ]
    report = {
        "benchmark": "prefix_cache",
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch",)} | {"python": platform.python_version()},
        "figures": figures,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
