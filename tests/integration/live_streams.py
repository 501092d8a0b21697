"""Streams that go on while a test does something to the processes under them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.cluster import Cluster

Body = dict[str, Any]
SAMPLINGS: tuple[Body, ...] = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.8, "seed": 8, "logprobs": 2, "n": 2},
    {"temperature": 0.7, "seed": 9, "min_tokens": 100, "stop": ["the", "in"]},
)
"""What has to stay right whatever happens on the way."""
Disturb = Callable[[], Awaitable[None]]
_BEGUN_TOKENS = 5
_BEGIN_S = 60.0


@dataclass
class Answer:
    """What one choice of a completion stream has said."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[tuple[str, float]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Streamed:
    """One stream: its choices by index, and the tokens of prompt and answer that its usage counts."""

    choices: dict[int, Answer] = field(default_factory=dict)
    usage: tuple[int, int] = (0, 0)


def bodies(seed: str, count: int, max_tokens: int) -> list[Body]:
    """Completions of random prompts, sampled in every way of `SAMPLINGS`."""
    draw = random.Random(seed)
    return [
        {
            "prompt": [draw.randrange(100, 4000) for _ in range(draw.choice((5, 60, 300)))],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            **SAMPLINGS[at % len(SAMPLINGS)],
        }
        for at in range(count)
    ]


async def stream(client: httpx.AsyncClient, body: Body, begun: asyncio.Event) -> Streamed:
    """Read a whole completion stream; `begun` is set once it has a few tokens."""
    streamed, seen = Streamed(), 0
    asked: Body = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json={**body, **asked}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            if usage := event.get("usage"):
                streamed.usage = usage["prompt_tokens"], usage["completion_tokens"]
            for choice in event["choices"]:
                seen += len(choice["token_ids"])
                add(streamed.choices.setdefault(choice["index"], Answer()), choice)
            if seen >= _BEGUN_TOKENS:
                begun.set()
    begun.set()
    return streamed


def add(answer: Answer, choice: Body) -> None:
    answer.tokens += choice["token_ids"]
    answer.text += choice["text"]
    answer.finish_reason = choice["finish_reason"]
    if logprobs := choice.get("logprobs"):
        answer.logprobs += zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)


async def streams(cluster: Cluster, bodies: Sequence[Body], disturb: Disturb | None = None) -> list[Streamed]:
    """All streams at once; once each has a few tokens, `disturb` happens beside them."""
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=120, limits=limits) as client:
        begun = [asyncio.Event() for _ in bodies]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(stream(client, body, event))
                for body, event in zip(bodies, begun, strict=True)
            ]
            async with asyncio.timeout(_BEGIN_S):
                for event in begun:
                    await event.wait()
            if disturb is not None:
                await disturb()
        return [task.result() for task in tasks]
