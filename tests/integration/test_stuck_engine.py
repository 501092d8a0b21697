"""A worker whose engine is stuck in a step leaves the cluster, says why, and costs no answer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx

from baton.worker.watchdog import STUCK_STATUS
from tests.conftest import StartCluster
from tests.integration.kvstore_processes import until


async def ask(base_url: str) -> list[int]:
    body = {"prompt": [300, 301, 302] * 20, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


async def test_a_worker_stuck_in_a_step_ends_and_its_requests_go_on_elsewhere(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    script, file, log = Path(__file__).with_name("stuck_worker.py"), tmp_path / "stuck", tmp_path / "log"
    with start_cluster("--hybrid", "1", "--policy", "round-robin") as cluster:
        flags = ("--kvstore", cluster.kvstore_address, "--worker-id", "stuck", "--role", "hybrid")
        limits = ("--kv-blocks", "500", "--step-timeout-s", "1")
        with log.open("wb") as stderr:
            worker = subprocess.Popen([sys.executable, script, file, *flags, *limits], stderr=stderr)
        try:
            await until(lambda: "stuck" in cluster.workers(), "the worker has joined")
            tokens = await ask(cluster.base_url)
            file.touch()
            answers = await asyncio.gather(*(ask(cluster.base_url) for _ in range(4)))
            assert answers == [tokens] * 4
            assert worker.wait(30) == STUCK_STATUS
            await until(lambda: "stuck" not in cluster.workers(), "the registry knows")
        finally:
            worker.kill()
            worker.wait()
    said = log.read_text()
    assert "--step-timeout-s" in said
    assert "stuck_begin" in said, "the log shows where the engine is"
