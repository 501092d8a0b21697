"""Two hundred streams at once, many of them cut off, leave nothing behind."""

from __future__ import annotations

import asyncio
import random

import httpx
import psutil

from tests.cluster import Cluster
from tests.integration.cluster_state import until

STREAMS = 200


def held(cluster: Cluster) -> dict[str, tuple[int, ...]]:
    """What requests hold on each worker: blocks, places, handoffs."""
    found = {}
    for worker_id in ("prefill-0", "decode-0"):
        status = cluster.status(worker_id)
        load = status.load
        found[worker_id] = (
            status.pinned_blocks,
            load.total_blocks - load.free_blocks,
            load.running,
            load.waiting,
            status.handoffs_serving,
            status.handoffs_reading,
        )
    return found


def resources(cluster: Cluster) -> dict[str, int]:
    """File descriptors of each process and asyncio tasks of each worker."""
    counts = {f"{name} descriptors": psutil.Process(pid).num_fds() for name, pid in cluster.pids().items()}
    for worker_id in ("prefill-0", "decode-0"):
        counts[f"{worker_id} tasks"] = cluster.status(worker_id).tasks
    return counts


async def streams(base_url: str) -> tuple[int, int]:
    """Run the streams; how many finished and how many this side cut off."""
    draw = random.Random(20)
    limits = httpx.Limits(max_connections=STREAMS)
    finished = cut = 0
    async with httpx.AsyncClient(base_url=base_url, timeout=300, limits=limits) as client:

        async def one() -> None:
            nonlocal finished, cut
            prompt = [draw.randrange(100, 4000) for _ in range(draw.choice((1, 20, 60, 200)))]
            # Not at all, before the first token, or after some.
            patience = draw.choice((None, None, 0, 1, 5))
            body = {
                "prompt": prompt,
                "max_tokens": 24,
                "stream": True,
                "ignore_eos": True,
                "temperature": 0.8,
            }
            if patience == 0:
                try:
                    async with asyncio.timeout(draw.random() * 2):
                        await client.post("/v1/completions", json=body)
                    finished += 1
                except TimeoutError:
                    cut += 1
                return
            async with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                seen = 0
                async for line in response.aiter_lines():
                    seen += line.startswith("data: ")
                    if seen == patience:
                        cut += 1
                        return
                assert seen == 25
                finished += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(STREAMS):
                tasks.create_task(one())
    return finished, cut


def test_streams_cut_at_random_leave_nothing_behind(cluster: Cluster) -> None:
    asyncio.run(streams(cluster.base_url))  # whatever is opened once is open now
    until(lambda: not any(map(any, held(cluster).values())), lambda: held(cluster))
    before = resources(cluster)
    finished, cut = asyncio.run(streams(cluster.base_url))
    assert finished + cut == STREAMS
    assert min(finished, cut) > 20

    until(lambda: not any(map(any, held(cluster).values())), lambda: held(cluster))
    until(
        lambda: all(count <= before[name] for name, count in resources(cluster).items()),
        lambda: (before, resources(cluster)),
    )
    metrics = httpx.get(f"{cluster.own_url}/metrics").text
    running = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    assert [float(line.split()[-1]) for line in running] == [0.0]
