"""Streams go on with the same tokens when a process under them is killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.cluster import Cluster
from tests.conftest import StartCluster

STREAMS = 6
TOKENS = 150


@pytest.fixture(scope="module")
def spare(start_cluster: StartCluster) -> Iterator[Cluster]:
    with start_cluster("--decode", "2") as up:
        yield up


async def stream(client: httpx.AsyncClient, prompt: list[int], begun: asyncio.Event) -> list[int]:
    body = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0.9,
        "seed": 5,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                tokens += event["choices"][0]["token_ids"]
                if len(tokens) > 5:
                    begun.set()
    return tokens


async def streams(cluster: Cluster, prompts: list[list[int]], victim: str | None) -> list[list[int]]:
    """All prompts at once; once each has a few tokens, `victim` is killed."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=120) as client:
        begun = [asyncio.Event() for _ in prompts]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(stream(client, prompt, event))
                for prompt, event in zip(prompts, begun, strict=True)
            ]
            for event in begun:
                async with asyncio.timeout(60):
                    await event.wait()
            if victim is not None:
                os.kill(cluster.pids()[victim], signal.SIGKILL)
        return [task.result() for task in tasks]


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0", "kvstore", "decode-1"])
def test_a_killed_process_costs_no_token(spare: Cluster, victim: str) -> None:
    draw = random.Random(victim)
    prompts = [[draw.randrange(100, 4000) for _ in range(100)] for _ in range(STREAMS)]
    undisturbed = asyncio.run(streams(spare, prompts, None))
    assert all(len(tokens) == TOKENS for tokens in undisturbed)
    assert asyncio.run(streams(spare, prompts, victim)) == undisturbed
