"""What of a KV transfer a client waits for, through a running cluster: what `transfer.py` shows last.

A prompt is prefilled in chunks, and each chunk's blocks are read while the next is computed. What is left to
read after the first token, and the handoff's end, delays the second one. So the time from the first token to
the second, less what it is on one worker that prefills and decodes, is the exposed transfer.
"""

from __future__ import annotations

import random
import re
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import uvloop
from engine import SHAPES
from rich.console import Console
from rich.table import Table
from served import Figure, figure, random_tokens, served_folder, stream

from tests.cluster import ROOT, Cluster, run_cluster

BUNDLED = ROOT / "models" / "baton-small"
APART = ("--prefill", "1", "--decode", "1", "--policy", "least-loaded")
WHOLE = ("--hybrid", "1")
MOST = 0.05
GOAL_FROM_TOKENS = 2048
_READ_S = re.compile(r"^baton_kv_transfer_seconds_sum\S* (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Exposed:
    """Seconds of one prompt length, medians: on separate workers, on one, and of reading KV in between."""

    tokens: int
    ttft_s: float
    second_s: float
    whole_ttft_s: float
    whole_second_s: float
    read_s: float

    @property
    def exposed_s(self) -> float:
        return max(0.0, self.second_s - self.whole_second_s)

    @property
    def share(self) -> float:
        """Of the time to first token."""
        return self.exposed_s / self.ttft_s


def read_seconds(apart: Cluster) -> float:
    """Seconds that the decode worker has spent on reads so far."""
    found = re.search(r"metrics on (\S+),", apart.logs()["decode-0"])
    if found is None:
        raise RuntimeError("the decode worker does not say where its metrics are")
    with urllib.request.urlopen(f"http://{found[1]}/metrics", timeout=10) as answer:
        seconds = _READ_S.search(answer.read().decode())
    return float(seconds[1]) if seconds else 0.0


def measure(folder: Path, lengths: Sequence[int], rounds: int) -> list[Exposed]:
    """Prompts of each length on both clusters in turn, one at a time, one worker per core."""
    draw = random.Random(0)
    results = []
    with ExitStack() as stack:
        apart, whole = (
            stack.enter_context(
                run_cluster(
                    Path(stack.enter_context(tempfile.TemporaryDirectory())),
                    *flags,
                    *("--threads", "1", "--dtype", "bfloat16"),
                    model=folder,
                )
            )
            for flags in (APART, WHOLE)
        )
        for length in lengths:
            taken: list[tuple[float, ...]] = []
            for number in range(rounds + 1):  # the first round warms up
                before_s = read_seconds(apart)
                ours = uvloop.run(stream(apart.base_url, random_tokens(length, draw), 4))
                read_s = read_seconds(apart) - before_s
                other = uvloop.run(stream(whole.base_url, random_tokens(length, draw), 4))
                if number:
                    taken.append((ours.ttft_s, ours.second_s, other.ttft_s, other.second_s, read_s))
            results.append(Exposed(length, *(median(column) for column in zip(*taken, strict=True))))
    return results


def exposed_figures(console: Console, quick: bool) -> list[Figure]:
    """Measure and show what is exposed of transfers, for a small and, unless `quick`, a larger model."""
    models = {"bundled": BUNDLED}
    if not quick:
        models["250m"] = served_folder(SHAPES["250m"])
    lengths, rounds = ((512, 2048), 3) if quick else ((512, 2048, 8128), 5)
    figures: list[Figure] = []
    for name, folder in models.items():
        table = Table(title=f"through the cluster, {name} model in bfloat16, one core per worker")
        for column in (
            *("prompt", "TTFT", "on one worker", "reading KV", "first to second token", "on one worker"),
            *("exposed", "of TTFT"),
        ):
            table.add_column(column, justify="right")
        for one in measure(folder, lengths, rounds if name == "bundled" else 2):
            seconds = (one.ttft_s, one.whole_ttft_s, one.read_s, one.second_s, one.whole_second_s)
            times = (f"{1e3 * value:.1f} ms" for value in (*seconds, one.exposed_s))
            table.add_row(str(one.tokens), *times, f"{one.share:.2%}")
            at_most = MOST if one.tokens >= GOAL_FROM_TOKENS - 64 else None
            prefix = f"exposed_{name}_{one.tokens}_tokens"
            figures += [
                figure(f"{prefix}_of_ttft", one.share, "ratio", at_most=at_most, peer="one hybrid worker"),
                figure(f"{prefix}_first_to_second", one.second_s, "s", peer=f"{one.whole_second_s:.4g}"),
                figure(f"{prefix}_reading", one.read_s, "s"),
            ]
        console.print(table)
    return figures
