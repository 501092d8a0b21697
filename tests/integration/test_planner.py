"""Does a planner change a running cluster's roles with what is asked of it, and what is left when it dies?"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

from baton.rpc.v1.worker_pb2 import ROLE_DECODE as DECODE
from baton.rpc.v1.worker_pb2 import ROLE_PREFILL as PREFILL
from tests.cluster import ROOT, Cluster
from tests.conftest import StartCluster

# A bound that makes a few requests too much for one decode worker.
BUSY = ("--plan-interval-s", "0.5", "--target-utilization", "0.05")


@contextmanager
def planner(cluster: Cluster, folder: Path, *flags: str) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A planner of its own for the cluster; gives its log and its process, which may be killed."""
    log = folder / "planner.log"
    command = [sys.executable, "-m", "services.planner", "--kvstore", cluster.kvstore_address]
    command += ["--router-metrics", cluster.own_url.removeprefix("http://"), *BUSY, *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stderr=output, stdin=subprocess.DEVNULL)
        try:
            yield log, process
            if process.poll() is None:
                process.terminate()
                assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


async def ask(cluster: Cluster, until: Callable[[], bool]) -> list[str]:
    """Short prompts with long answers, eight at a time, until something is so; the answers' ends."""
    client = openai.AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="none", max_retries=0)
    model = (await client.models.list()).data[0].id
    deadline_s = time.monotonic() + 60
    ends: list[str] = []
    done = False

    async def caller(number: int) -> None:
        asked = 0
        while not done:
            asked += 1
            prompt = f"{number} {asked} def f(x):"
            answer = await client.completions.create(model=model, prompt=prompt, max_tokens=100)
            ends.append(answer.choices[0].finish_reason)

    async with client, asyncio.TaskGroup() as tasks:
        for number in range(8):
            tasks.create_task(caller(number))
        while not (done := await asyncio.to_thread(until)):
            assert time.monotonic() < deadline_s, "nothing came of it"
            await asyncio.sleep(0.2)
    return ends


def roles(cluster: Cluster) -> list[int]:
    return [cluster.status(worker_id).role for worker_id in cluster.workers()]


def test_answers_turn_a_prefill_worker_into_a_decode_worker_for_as_long_as_there_is_a_planner(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    with start_cluster("--prefill", "2", "--decode", "1") as cluster:
        with planner(cluster, tmp_path, "--dry-run") as (log, _):
            ends = asyncio.run(ask(cluster, lambda: "would flip prefill" in log.read_text()))
        assert sorted(roles(cluster)) == [PREFILL, PREFILL, DECODE]
        with planner(cluster, tmp_path) as (_, process):
            ends += asyncio.run(ask(cluster, lambda: roles(cluster).count(DECODE) == 2))
            ends += asyncio.run(ask(cluster, lambda: True))
            process.kill()
            process.wait()
        ends += asyncio.run(ask(cluster, lambda: sorted(roles(cluster)) == [PREFILL, PREFILL, DECODE]))
        ends += asyncio.run(ask(cluster, lambda: True))
    assert len(ends) > 8
    assert set(ends) <= {"length", "stop"}
