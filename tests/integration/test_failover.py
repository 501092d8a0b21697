"""Answers go on with the same tokens when a process under them is killed, on whichever front."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.live_streams import Body, Disturb, Streamed, bodies, streams

TOKENS = 150


@pytest.fixture(scope="module")
def spare(start_cluster: StartCluster) -> Iterator[Cluster]:
    with start_cluster("--decode", "2") as up:
        yield up


async def whole(cluster: Cluster, body: Body) -> Any:
    """The choices of a completion that is not streamed, and what it counts."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=120) as client:
        response = await client.post("/v1/completions", json={**body, "return_token_ids": True})
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"], answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]


async def over_grpc(cluster: Cluster, body: Body) -> tuple[list[int], str, list[float], int]:
    """Tokens, text, log-probabilities and counted tokens of a completion over gRPC."""
    fields = ("max_tokens", "ignore_eos", "temperature", "seed", "min_tokens", "stop", "logprobs")
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=body["prompt"]),
        sampling=inference_pb2.SamplingParams(**{name: body[name] for name in fields if name in body}),
    )
    tokens: list[int] = []
    text, logprobs, counted = "", [], 0
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        async for part in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=120):
            tokens += part.token_ids
            text += part.text
            logprobs += [position.chosen.logprob for position in part.logprobs]
            counted += part.usage.completion_tokens
    return tokens, text, logprobs, counted


async def everything(
    cluster: Cluster, asked: list[Body], disturb: Disturb | None = None
) -> tuple[list[Streamed], list[Any]]:
    """Every body as a stream, and beside that whole and over gRPC."""
    async with asyncio.TaskGroup() as tasks:
        others = [tasks.create_task(ask(cluster, body)) for body in asked for ask in (whole, over_grpc)]
        streamed = await streams(cluster, asked, disturb)
    return streamed, [other.result() for other in others]


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0", "kvstore", "decode-1"])
def test_a_killed_process_costs_no_token(spare: Cluster, victim: str) -> None:
    asked = bodies(victim, 5, TOKENS)
    undisturbed = asyncio.run(everything(spare, asked))
    assert all(len(answer.tokens) == TOKENS for one in undisturbed[0][:4] for answer in one.choices.values())

    async def kill() -> None:
        os.kill(spare.pids()[victim], signal.SIGKILL)

    assert asyncio.run(everything(spare, asked, kill)) == undisturbed
