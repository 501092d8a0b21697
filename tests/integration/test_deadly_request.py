"""A request that workers die of is refused; those that ran beside it get their answers."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import wait_for_workers
from tests.integration.deadly_worker import DEADLY_TOKEN
from tests.integration.live_streams import streams

WORKERS = 4
# More than the cluster's own decode worker can hold: everything here runs on workers that can die of it.
PROMPT_TOKENS = 600
SMALL_BLOCKS, LARGE_BLOCKS = 24, 1000


@contextmanager
def deadly_workers(cluster: Cluster) -> Iterator[list[subprocess.Popen[bytes]]]:
    script = Path(__file__).with_name("deadly_worker.py")
    flags = ("--kvstore", cluster.kvstore_address, "--kv-blocks", str(LARGE_BLOCKS))
    names = [f"deadly-{number}" for number in range(WORKERS)]
    workers = [subprocess.Popen([sys.executable, script, *flags, "--worker-id", name]) for name in names]
    try:
        wait_for_workers(cluster, *names)
        yield workers
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(60)


def prompt(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100, 4000) for _ in range(PROMPT_TOKENS)]


def test_a_deadly_request_is_not_tried_again_and_bystanders_get_their_answers(
    start_cluster: StartCluster,
) -> None:
    flags = ("--prefill", "0", "--decode", "1", "--kv-blocks", str(SMALL_BLOCKS))
    with start_cluster(*flags) as cluster, deadly_workers(cluster) as workers:
        bystanders = [
            {"prompt": prompt(seed), "max_tokens": 300, "temperature": 0, "ignore_eos": True}
            for seed in range(6)
        ]
        undisturbed = asyncio.run(streams(cluster, bystanders))
        refusals: list[httpx.Response] = []

        async def poison() -> None:
            async with httpx.AsyncClient(base_url=cluster.base_url, timeout=60) as client:
                body = {"prompt": [*prompt(99)[:-1], DEADLY_TOKEN], "max_tokens": 50}
                refusals.append(await client.post("/v1/completions", json=body))

        assert asyncio.run(streams(cluster, bystanders, poison)) == undisturbed
        (refusal,) = refusals
        assert refusal.status_code == 500
        assert "not tried again" in refusal.json()["error"]["message"]
        dead = sum(worker.poll() is not None for worker in workers)
        assert 2 <= dead <= 3  # one more where a bystander had been there both times
