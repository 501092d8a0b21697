"""The OpenAI endpoints against a fake decode worker, with real clients over real sockets."""

from __future__ import annotations

import json

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.unit.router.fakes import FakeWorker, RunningRouter

NAME = "baton-small"


async def events(client: httpx.AsyncClient, path: str, body: dict) -> tuple[httpx.Headers, list[dict]]:
    """The decoded events of a streamed answer, which must end with [DONE]."""
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return response.headers, [json.loads(line[6:]) for line in lines[:-1]]


async def test_a_completion_is_the_workers_tokens_as_text(http: httpx.AsyncClient, answer: str) -> None:
    response = await http.post("/v1/completions", json={"model": NAME, "prompt": "Hi", "max_tokens": 400})
    body = response.json()
    assert response.status_code == 200, body
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == answer
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert response.headers["x-baton-prefill"] == "local"
    assert response.headers["x-baton-decode-worker"] == "decode-0"
    assert response.headers["x-baton-cached-tokens"] == "3"


async def test_a_streamed_completion_joins_to_the_same_text(
    http: httpx.AsyncClient, answer: str, script: list[int]
) -> None:
    headers, chunks = await events(
        http, "/v1/completions",
        {"prompt": "Hi", "max_tokens": 400, "stream_options": {"include_usage": True}, "return_token_ids": True},
    )
    *pieces, usage = chunks
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == answer
    assert [i for piece in pieces for i in piece["choices"][0]["token_ids"]] == [*script, 1]
    assert pieces[0]["choices"][0]["prompt_token_ids"]
    assert all(piece["choices"][0]["prompt_token_ids"] is None for piece in pieces[1:])
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * len(script) + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(script) + 1
    assert headers["x-baton-prefill"] == "local"
