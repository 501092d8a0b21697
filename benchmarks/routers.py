"""Do two routers behind one port place as well as one? Hit rate and the busiest worker, with real processes.

    python benchmarks/routers.py [--quick]

`baton up` runs the bundled model on four hybrid workers behind one router, and then behind two that share the
port; rounds alternate, each with a fresh cluster. Conversations begin with one of 16 system prompts, the
first of them the most popular (Zipf), and go on for four turns, every prompt with all that was said before.
Each request comes over a connection of its own, so that the kernel deals requests out to the routers at
random. The workers' pools together hold less than what is asked for.

- hit: prompt tokens whose KV was at hand (`x-baton-cached-tokens`)
- possible: the same if nothing were ever evicted and every worker had it all
- busiest / mean: CPU seconds of the workers' processes while the load lasted
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from served import cpu_seconds, figure, print_report, random_tokens

from tests.cluster import Cluster, run_cluster

WORKERS = 4
KV_BLOCKS = 400
BLOCK_TOKENS = 16
SYSTEM_PROMPTS = 16
SYSTEM_TOKENS = 512
QUESTION_TOKENS = 48
ANSWER_TOKENS = 16
TURNS = 4
CLIENTS = 8


@dataclass(frozen=True)
class Round:
    """What came of one replay. `cpu_s` is by worker, `served` counts requests by router."""

    prompt_tokens: int
    hit_tokens: int
    possible_tokens: int
    cpu_s: Sequence[float]
    served: Sequence[float]

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens

    @property
    def imbalance(self) -> float:
        return max(self.cpu_s) / fmean(self.cpu_s)


class Clients:
    """Conversations one after the other, `CLIENTS` at a time; the same ones in every round."""

    def __init__(self, base_url: str, conversations: int) -> None:
        draw = random.Random(11)
        self._systems = [random_tokens(SYSTEM_TOKENS, draw) for _ in range(SYSTEM_PROMPTS)]
        weights = [1 / (1 + number) for number in range(SYSTEM_PROMPTS)]
        self._chosen = iter(draw.choices(range(SYSTEM_PROMPTS), weights, k=conversations))
        self._http = httpx.AsyncClient(
            base_url=base_url, timeout=120, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._seen: set[tuple[int, ...]] = set()
        self.prompt_tokens = self.hit_tokens = self.possible_tokens = 0

    async def run(self) -> None:
        async with self._http, asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._client(random.Random(number)))

    async def _client(self, draw: random.Random) -> None:
        for system in self._chosen:
            said = list(self._systems[system])
            for _ in range(TURNS):
                said += random_tokens(QUESTION_TOKENS, draw)
                said += await self._ask(said)

    async def _ask(self, prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        response = await self._http.post("/v1/completions", json={**body, "return_token_ids": True})
        response.raise_for_status()
        answer: list[int] = response.json()["choices"][0]["token_ids"]
        self.prompt_tokens += len(prompt)
        self.hit_tokens += int(response.headers["x-baton-cached-tokens"])
        self.possible_tokens += BLOCK_TOKENS * sum(start in self._seen for start in _starts(prompt))
        self._seen.update(_starts(prompt + answer))
        return answer


def _starts(tokens: list[int]) -> list[tuple[int, ...]]:
    """What whole blocks of `tokens` stand for, the last token left out: it is always computed."""
    return [tuple(tokens[:end]) for end in range(BLOCK_TOKENS, len(tokens), BLOCK_TOKENS)]


def served_by(cluster: Cluster) -> list[float]:
    """Requests that each router has placed."""
    counts = []
    for own_url in cluster.own_urls:
        families = text_string_to_metric_families(httpx.get(f"{own_url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        counts.append(sum(one.value for one in samples if one.name == "vllm:request_success_total"))
    return counts


def replay(routers: int, conversations: int) -> Round:
    flags = ("--hybrid", str(WORKERS), "--routers", str(routers), "--kv-blocks", str(KV_BLOCKS))
    with tempfile.TemporaryDirectory() as folder, run_cluster(Path(folder), *flags) as cluster:
        pids = [pid for name, pid in cluster.pids().items() if name.startswith("hybrid")]
        before = [cpu_seconds(pid) for pid in pids]
        clients = Clients(cluster.base_url, conversations)
        asyncio.run(clients.run())
        spent = [cpu_seconds(pid) - began for pid, began in zip(pids, before, strict=True)]
        return Round(
            prompt_tokens=clients.prompt_tokens,
            hit_tokens=clients.hit_tokens,
            possible_tokens=clients.possible_tokens,
            cpu_s=spent,
            served=served_by(cluster),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of 60 conversations, not 3 of 200")
    quick = parser.parse_args().quick
    conversations, rounds = (60, 1) if quick else (200, 3)
    done: dict[int, list[Round]] = {1: [], 2: []}
    for number in range(rounds):
        for routers in (1, 2) if number % 2 == 0 else (2, 1):
            done[routers].append(replay(routers, conversations))
    table = Table(
        "routers", "hit %", "possible %", "busiest / mean", "requests by router", "CPU s by worker",
        title=f"{TURNS * conversations} requests on {WORKERS} workers, {KV_BLOCKS} blocks each",
    )  # fmt: skip
    for routers, replays in done.items():
        for one in replays:
            table.add_row(
                str(routers),
                f"{100 * one.hit_rate:.1f}",
                f"{100 * one.possible_tokens / one.prompt_tokens:.1f}",
                f"{one.imbalance:.3f}",
                " + ".join(f"{count:.0f}" for count in one.served),
                ", ".join(f"{seconds:.1f}" for seconds in one.cpu_s),
            )
    Console(file=sys.stdout, width=120).print(table)
    one, two = (median(100 * replayed.hit_rate for replayed in done[routers]) for routers in (1, 2))
    busiest = {routers: median(replayed.imbalance for replayed in done[routers]) for routers in (1, 2)}
    print_report(
        "routers",
        [
            figure("hit_rate_one_router", one, "%"),
            figure("hit_rate_two_routers", two, "%"),
            figure("hit_rates_apart", abs(one - two), "points", at_most=1, peer="one router"),
            figure("busiest_over_mean_one_router", busiest[1], "ratio"),
            figure("busiest_over_mean_two_routers", busiest[2], "ratio", at_most=1.25),
        ],
    )


if __name__ == "__main__":
    main()
