"""What do clients notice when workers are drained, killed, restarted one by one, or given another role?

    python benchmarks/rolling.py [--quick]

`baton up` runs two prefill and two decode workers with the bundled model. Clients stream answers, and compare
each token with what the same prompt gave before anything happened.

- rolling restart: every worker in turn gets SIGTERM and is started again, while clients ask without a break
- pause: the longest time between two tokens of a stream whose decode worker was told to drain, or was killed;
  `usual_gap` is the median without that
- flip: from the call of `WorkerAdmin.SetRole` to the first token that the worker computed, or decoded, in its
  new role; streams run on it before
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import aiohttp
import grpc
from rich.console import Console
from rich.table import Table
from served import Figure, figure, print_report, random_tokens

from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.cluster import Cluster, run_cluster

PROMPTS = 12
PROMPT_TOKENS, OUTPUT_TOKENS = 200, 600
CLIENTS = 8
BACK_S = 120.0
FLIP_S = 20.0
PROBE_EVERY_S = 0.03
SETTLED_S = 1.0
AMID_S = 0.3
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
LAST = WORKERS[-1]
OTHER_ROLE = {
    worker_pb2.ROLE_PREFILL: worker_pb2.ROLE_DECODE,
    worker_pb2.ROLE_DECODE: worker_pb2.ROLE_PREFILL,
}


@dataclass
class Streamed:
    """One answer: who decoded it first, its tokens, when each event came, and why it ended early, if so."""

    decode_worker: str = ""
    prefill_worker: str = ""
    tokens: list[int] = field(default_factory=list)
    events_s: list[float] = field(default_factory=list)
    failure: str = ""

    def pause_s(self, since_s: float) -> float:
        """The longest time between two events, of those after `since_s`."""
        gaps = (after - before for before, after in pairwise(self.events_s) if after > since_s)
        return max(gaps, default=0.0)


class Clients:
    """Streams prompts to a cluster: a few, so that each answer is known after the first time."""

    def __init__(self, base_url: str, session: aiohttp.ClientSession) -> None:
        draw = random.Random(3)
        self._url = f"{base_url}/v1/completions"
        self._session = session
        self.prompts = [random_tokens(PROMPT_TOKENS, draw) for _ in range(PROMPTS)]
        self.answers: list[list[int]] = []
        self.usual_gap_s = 0.0

    async def learn(self) -> None:
        """Ask everything once, undisturbed."""
        streamed = await asyncio.gather(*(self.ask(prompt) for prompt in self.prompts))
        for one in streamed:
            if one.failure:
                raise RuntimeError(one.failure)
        self.answers = [one.tokens for one in streamed]
        gaps_s = (after - before for one in streamed for before, after in pairwise(one.events_s))
        self.usual_gap_s = median(gaps_s)

    async def ask(
        self, prompt: list[int], tokens: int = OUTPUT_TOKENS, begun: asyncio.Event | None = None
    ) -> Streamed:
        streamed = Streamed()
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": 1, "ignore_eos": True}
        try:
            async with self._session.post(
                self._url, json={**body, "stream": True, "return_token_ids": True}
            ) as response:
                if response.status != 200:
                    streamed.failure = f"status {response.status}: {await response.text()}"
                    return streamed
                streamed.decode_worker = response.headers["x-baton-decode-worker"]
                streamed.prefill_worker = response.headers.get("x-baton-prefill-worker", "")
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        streamed.failure = str(event["error"])
                        break
                    streamed.events_s.append(time.monotonic())
                    for choice in event["choices"]:
                        streamed.tokens += choice["token_ids"]
                    if begun is not None:
                        begun.set()
        except aiohttp.ClientError as error:
            streamed.failure = repr(error)
        finally:
            if begun is not None:
                begun.set()
        return streamed


@dataclass
class Tally:
    """What became of requests: how many, failed ones, and tokens that came, were missing or were wrong."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0
    lost: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, streamed: Streamed, expected: list[int]) -> None:
        self.requests += 1
        self.tokens += len(streamed.tokens)
        if streamed.failure:
            self.failed += 1
            self.failures.append(streamed.failure)
        right = sum(a == b for a, b in zip(streamed.tokens, expected, strict=False))
        self.lost += len(expected) - right + max(0, len(streamed.tokens) - len(expected))


async def back(cluster: Cluster, worker_id: str, incarnation: str) -> None:
    """Wait until another incarnation of the worker has joined."""
    async with asyncio.timeout(BACK_S):
        while True:
            try:
                status = await asyncio.to_thread(cluster.status, worker_id)
                if status.incarnation != incarnation:
                    return
            except (KeyError, grpc.RpcError):
                pass
            await asyncio.sleep(0.1)


async def find(cluster: Cluster, worker_id: str) -> tuple[int, str]:
    """The worker's process id and incarnation. Takes a while, and must hold up no client that is timed."""
    pids = await asyncio.to_thread(cluster.pids)
    status = await asyncio.to_thread(cluster.status, worker_id)
    return pids[worker_id], status.incarnation


async def rolling(cluster: Cluster, clients: Clients, tally: Tally) -> float:
    """Restart every worker in turn under load; the seconds that it took."""
    over = False

    async def keep_asking(number: int) -> None:
        draw = random.Random(number)
        while not over:
            at = draw.randrange(PROMPTS)
            tally.add(await clients.ask(clients.prompts[at]), clients.answers[at])

    began_s = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number in range(CLIENTS):
            tasks.create_task(keep_asking(number))
        for worker_id in WORKERS:
            pid, incarnation = await find(cluster, worker_id)
            os.kill(pid, signal.SIGTERM)
            await back(cluster, worker_id, incarnation)
        took_s = time.monotonic() - began_s
        over = True
    return took_s


async def pauses(
    cluster: Cluster, clients: Clients, number: signal.Signals, rounds: int, tally: Tally
) -> list[float]:
    """The pauses of the streams on a decode worker that gets the signal, over so many rounds."""
    found = []
    for at in range(rounds):
        victim = f"decode-{at % 2}"
        pid, incarnation = await find(cluster, victim)
        begun = [asyncio.Event() for _ in clients.prompts]
        async with asyncio.TaskGroup() as tasks:
            asking = [
                tasks.create_task(clients.ask(prompt, begun=event))
                for prompt, event in zip(clients.prompts, begun, strict=True)
            ]
            for event in begun:
                await event.wait()
            await asyncio.sleep(AMID_S)
            sent_s = time.monotonic()
            os.kill(pid, number)
        for task, expected in zip(asking, clients.answers, strict=True):
            streamed = task.result()
            tally.add(streamed, expected)
            if streamed.decode_worker == victim and streamed.events_s[-1] > sent_s:
                found.append(streamed.pause_s(sent_s))
        await back(cluster, victim, incarnation)
    return found


def prefilled_by_last(answer: Streamed) -> bool:
    return answer.prefill_worker == LAST


def decoded_by_last(answer: Streamed) -> bool:
    return answer.decode_worker == LAST


async def set_role(cluster: Cluster, worker_id: str, role: worker_pb2.Role.ValueType) -> None:
    """Have the worker in a role before it is measured how fast it leaves it."""
    async with grpc.aio.insecure_channel(cluster.workers()[worker_id]) as channel:
        stub = worker_pb2_grpc.WorkerAdminStub(channel)
        await stub.SetRole(worker_pb2.SetRoleRequest(role=role), timeout=10)
    await asyncio.sleep(SETTLED_S)


async def flip(
    cluster: Cluster,
    clients: Clients,
    worker_id: str,
    role: worker_pb2.Role.ValueType,
    works: Callable[[Streamed], bool],
    tally: Tally,
) -> float:
    """Give the worker another role under load; the seconds until `works` holds of an answer's first token."""
    address = cluster.workers()[worker_id]
    begun = [asyncio.Event() for _ in clients.prompts]
    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as tasks:
        asking = [
            tasks.create_task(clients.ask(prompt, begun=event))
            for prompt, event in zip(clients.prompts, begun, strict=True)
        ]
        for event in begun:
            await event.wait()
        decided_s = time.monotonic()
        stub = worker_pb2_grpc.WorkerAdminStub(channel)
        await stub.SetRole(worker_pb2.SetRoleRequest(role=role), timeout=10)
        took_s = await _first_work(clients, decided_s, works)
    for task, expected in zip(asking, clients.answers, strict=True):
        tally.add(task.result(), expected)
    return took_s


async def _first_work(clients: Clients, decided_s: float, works: Callable[[Streamed], bool]) -> float:
    draw = random.Random()
    found: list[float] = []

    async def probe() -> None:
        streamed = await clients.ask(random_tokens(PROMPT_TOKENS, draw), tokens=2)
        if works(streamed):
            found.append(streamed.events_s[0] - decided_s)

    async with asyncio.timeout(FLIP_S), asyncio.TaskGroup() as tasks:
        while not found:
            tasks.create_task(probe())
            await asyncio.sleep(PROBE_EVERY_S)
    return min(found)


class Results:
    """The table and the figures, a line at a time."""

    def __init__(self) -> None:
        self.table = Table("what", "requests", "failed", "tokens", "lost or wrong", "median s", "worst s")
        self.figures: list[Figure] = []

    def add(self, what: str, tally: Tally, took_s: list[float], name: str, goal_s: float | None) -> None:
        """`took_s` are seconds of which the median has the goal; counts have the goal to be 0."""
        middle, worst = (median(took_s), max(took_s)) if took_s else (None, None)
        shown = [f"{value:.3f}" if value is not None else "-" for value in (middle, worst)]
        counts = [str(each) for each in (tally.requests, tally.failed, tally.tokens, tally.lost)]
        self.table.add_row(what, *counts, *shown)
        print(what, *counts, *shown, file=sys.stderr)
        self.figures += [
            figure(f"{name}_requests", tally.requests, "requests"),
            figure(f"{name}_failed", tally.failed, "requests", at_most=0),
            figure(f"{name}_tokens_lost", tally.lost, "tokens", at_most=0),
            figure(f"{name}_median", middle, "s", at_most=goal_s),
            figure(f"{name}_worst", worst, "s"),
        ]
        for failure in tally.failures[:3]:
            print(f"{what}: {failure}", file=sys.stderr)


async def measure(cluster: Cluster, rounds: int) -> Results:
    results = Results()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        clients = Clients(cluster.base_url, session)
        await clients.learn()
        results.figures.append(figure("usual_gap_median", clients.usual_gap_s, "s"))
        print(f"between two tokens of {PROMPTS} streams: {clients.usual_gap_s:.4f} s", file=sys.stderr)
        for what, name, role, works in (
            ("flipped to prefill", "flip_to_prefill", worker_pb2.ROLE_PREFILL, prefilled_by_last),
            ("flipped to decode", "flip_to_decode", worker_pb2.ROLE_DECODE, decoded_by_last),
        ):
            tally, took_s = Tally(), []
            for _ in range(rounds):
                await set_role(cluster, LAST, OTHER_ROLE[role])
                took_s.append(await flip(cluster, clients, LAST, role, works, tally))
            results.add(what, tally, took_s, name, 1.0)
        for what, number, name, goal_s in (
            ("drained", signal.SIGTERM, "drain_pause", 0.2),
            ("killed", signal.SIGKILL, "kill_pause", 1.5),
        ):
            tally = Tally()
            found = await pauses(cluster, clients, number, rounds, tally)
            results.add(what, tally, found, name, goal_s)
        tally = Tally()
        results.add("rolling restart", tally, [await rolling(cluster, clients, tally)], "rolling", None)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of each instead of eight")
    rounds = 1 if parser.parse_args().quick else 8
    # Round-robin: every prefill and every decode worker has work at any time.
    flags = ("--prefill", "2", "--decode", "2", "--policy", "round-robin")
    with tempfile.TemporaryDirectory() as folder, run_cluster(Path(folder), *flags) as cluster:
        results = asyncio.run(measure(cluster, rounds))
    Console(file=sys.stdout, width=110).print(results.table)
    print_report("rolling", results.figures)


if __name__ == "__main__":
    main()
