"""The soak: what undisturbed answers are, then the same questions under faults, then what is left behind."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from tests.chaos.clients import Answer, Client, Tally
from tests.chaos.faults import Done, Faults
from tests.chaos.questions import Question, draw_questions
from tests.cluster import Cluster, run_cluster
from tests.integration.redis_processes import RedisProcess

_KV_BLOCKS = 384
_HOST_BYTES = 4 << 20
_WORKER_FLAGS = ("--kv-blocks", str(_KV_BLOCKS), "--kv-host-bytes", str(_HOST_BYTES))
_CLUSTER_FLAGS = ("--routers", "2", "--prefill", "2", "--decode", "2", "--hybrid", "1")
_AT_REST_S = 30.0


@dataclass(frozen=True)
class Report:
    """What happened. `leaked` is blocks per worker that nobody should hold any more; `crashes` are ends of
    processes that no fault explains."""

    faults: list[Done]
    tally: Tally
    leaked: dict[str, int]
    crashes: list[str]


async def soak(
    folder: Path,
    *,
    seconds: float,
    seed: int,
    clients: int,
    questions: int,
    pause_s: float,
    cluster_flags: Sequence[str] = _CLUSTER_FLAGS,
) -> Report:
    """Disturb a cluster for `seconds` while `clients` ask; `folder` is an empty one for its files.

    Raises:
        AssertionError: a process did not come up, or not again.
    """
    asked = draw_questions(questions, seed)
    async with _running(folder / "reference", "--hybrid", "1", *_WORKER_FLAGS) as cluster:
        expected = await _undisturbed(cluster, asked, clients)
    async with AsyncExitStack() as stack:
        redis = RedisProcess(folder / "redis.log")
        stack.callback(redis.kill)
        await redis.start()
        flags = (*cluster_flags, *_WORKER_FLAGS, "--redis", redis.url)
        cluster = await stack.enter_async_context(_running(folder / "disturbed", *flags))
        faults = Faults(cluster, redis, seed, pause_s)
        tally = Tally()
        async with asyncio.TaskGroup() as tasks:
            over = asyncio.Event()
            for number in range(clients):
                draw = random.Random(f"{seed}/{number}")
                tasks.create_task(_keep_asking(cluster, asked, expected, draw, tally, faults, over))
            await faults.run(seconds)
            over.set()
        async with Client(cluster.base_url, cluster.grpc_address, tally) as client:
            for question in asked:  # whoever has been left wedged does not answer
                await client.check(question, expected[question], faults.router_failed)
        leaked = await _leaked(cluster)
        return Report(faults.done, tally, leaked, _crashes(cluster))


async def _undisturbed(
    cluster: Cluster, questions: Sequence[Question], clients: int
) -> dict[Question, Answer]:
    """Every question's answer."""
    left = list(questions)
    answers: dict[Question, Answer] = {}

    async def ask() -> None:
        async with Client(cluster.base_url, cluster.grpc_address, Tally()) as client:
            while left:
                question = left.pop()
                answers[question] = await client.ask(question)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(ask())
    return answers


async def _keep_asking(
    cluster: Cluster,
    questions: Sequence[Question],
    expected: dict[Question, Answer],
    draw: random.Random,
    tally: Tally,
    faults: Faults,
    over: asyncio.Event,
) -> None:
    async with Client(cluster.base_url, cluster.grpc_address, tally) as client:
        while not over.is_set():
            question = draw.choice(questions)
            await client.check(question, expected[question], faults.router_failed)


async def _leaked(cluster: Cluster) -> dict[str, int]:
    """Blocks that each worker still holds for somebody, once there has been time to notice that all have
    gone; none when everything is as it should be."""
    deadline = time.monotonic() + _AT_REST_S
    while True:
        held = await asyncio.to_thread(_held, cluster)
        if not any(held.values()) or time.monotonic() > deadline:
            return {worker_id: blocks for worker_id, blocks in held.items() if blocks}
        await asyncio.sleep(0.2)


def _held(cluster: Cluster) -> dict[str, int]:
    held = {}
    for worker_id in cluster.workers():
        try:
            status = cluster.status(worker_id)
        except (grpc.RpcError, KeyError):
            held[worker_id] = -1  # it does not say
            continue
        load = status.load
        streams = status.handoffs_serving + status.handoffs_reading
        held[worker_id] = max(
            status.pinned_blocks,
            load.total_blocks - load.free_blocks,
            load.running + load.waiting,
            streams,
        )
    return held


def _crashes(cluster: Cluster) -> list[str]:
    """Deaths that neither a kill nor a drain explains."""
    died = re.findall(r"^(\S+) died \((.*?)\)", cluster.stderr, re.MULTILINE)
    return [f"{name}: {how}" for name, how in died if how not in ("killed by SIGKILL", "exit status 0")]


@asynccontextmanager
async def _running(folder: Path, *flags: str) -> AsyncIterator[Cluster]:
    folder.mkdir()
    up = run_cluster(folder, *flags, "--kv-verify")
    cluster = await asyncio.to_thread(up.__enter__)
    try:
        yield cluster
    finally:
        await asyncio.to_thread(up.__exit__, None, None, None)
