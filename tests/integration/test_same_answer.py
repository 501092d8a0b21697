"""A disaggregated answer equals a hybrid worker's, bit for bit: tokens, text and log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.cluster import Cluster
from tests.conftest import StartCluster

PROMPTS = (
    "import os\n\n\ndef walk(top):\n",
    "The quick brown fox " * 40,
    "class Node:\n    def __init__(self",
    "x",
    "def fibonacci(n):\n" + "    # count up\n" * 60,
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {"50": 3}},
    {"temperature": 0.9, "seed": 11},
    {"temperature": 1.4, "seed": 12, "top_k": 40, "min_p": 0.02},
    {"temperature": 1.0, "seed": 13, "top_p": 0.8, "presence_penalty": 0.5, "n": 2},
)


@pytest.fixture(scope="module", params=["off", "on"], ids=["in-turn", "overlapped"])
def apart(start_cluster: StartCluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Prefills remotely whatever the curves predict; its steps run in turn, then overlapped."""
    with start_cluster("--policy", "round-robin", "--overlap", request.param) as up:
        yield up


@pytest.fixture(scope="module")
def hybrid(start_cluster: StartCluster) -> Iterator[Cluster]:
    with start_cluster("--hybrid", "1") as up:
        yield up


async def answers(base_url: str, concurrency: int) -> list[tuple[str, Any]]:
    """Where each request was prefilled, and its choices, in the order of requests."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=300) as client:

        async def ask(prompt: str, sampling: dict[str, Any]) -> tuple[str, Any]:
            body = {"model": "baton-small", "prompt": prompt, "max_tokens": 48, "logprobs": 3, **sampling}
            async with gate:
                response = await client.post("/v1/completions", json={**body, "return_token_ids": True})
            assert response.status_code == 200, response.text
            return response.headers["x-baton-prefill"], response.json()["choices"]

        return await asyncio.gather(*(ask(p, s) for s in SAMPLINGS for p in PROMPTS))


@pytest.fixture(scope="module")
def alone(hybrid: Cluster) -> list[Any]:
    """The choices of each request, computed by one worker with nothing beside it."""
    together = asyncio.run(answers(hybrid.base_url, concurrency=1))
    assert {kind for kind, _ in together} <= {"local", "cached"}
    return [choices for _, choices in together]


def test_a_disaggregated_answer_equals_a_hybrid_one(apart: Cluster, alone: list[Any]) -> None:
    handed_over = asyncio.run(answers(apart.base_url, concurrency=1))
    assert {kind for kind, _ in handed_over} == {"remote"}
    assert [choices for _, choices in handed_over] == alone


def test_batch_mates_change_no_disaggregated_answer(apart: Cluster, alone: list[Any]) -> None:
    batched = asyncio.run(answers(apart.base_url, concurrency=25))
    assert [choices for _, choices in batched] == alone


def test_neither_batch_mates_nor_the_cache_change_an_answer(hybrid: Cluster, alone: list[Any]) -> None:
    batched = asyncio.run(answers(hybrid.base_url, concurrency=25))
    assert [choices for _, choices in batched] == alone
