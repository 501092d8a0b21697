"""What the router makes of a worker that gives its requests up: every token once, in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from baton.rpc.v1 import worker_pb2
from tests.unit.router.fakes import FakeWorker, RunningRouter, running_router, running_worker
from tests.waiting import until

C = "/v1/completions"
ASK = {"prompt": "Hi", "max_tokens": 400, "stream": True, "return_token_ids": True, "logprobs": 1}
HELD = 5
Kind = worker_pb2.RequestError


class Pair:
    """Two workers behind a router, and a stream on `source` that is held after a few tokens."""

    def __init__(self, workers: list[FakeWorker], router: RunningRouter, client: httpx.AsyncClient) -> None:
        self.workers, self.router, self.client = workers, router, client
        self.tokens: list[int] = []

    async def begin(self) -> None:
        for worker in self.workers:
            worker.hold_at = HELD
        self.asking = asyncio.create_task(self._ask())
        await until(lambda: len(self.tokens) >= HELD)
        self.workers.sort(key=lambda worker: not worker.running)
        self.source, self.target = self.workers
        self.target.hold_at = None

    async def _ask(self) -> tuple[list[int], int]:
        """The tokens that came, and how many came with log-probabilities."""
        logprobs = 0
        async with self.client.stream("POST", C, json=ASK) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    self.tokens += choice["token_ids"]
                    logprobs += len(choice["logprobs"]["tokens"])
        return self.tokens, logprobs

    async def counted(self, line: str) -> bool:
        return (
            line
            in (await self.client.get(f"http://127.0.0.1:{self.router.router.metrics_port}/metrics")).text
        )


@pytest.fixture
async def pair(script: list[int]) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(running_worker(FakeWorker(name, script)))
            for name in ("decode-0", "decode-1")
        ]
        router = await stack.enter_async_context(running_router(*workers))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=router.base_url, timeout=60))
        pair = Pair(workers, router, client)
        await pair.begin()
        yield pair


async def test_the_stream_goes_on_where_the_other_worker_takes_it_over(pair: Pair, script: list[int]) -> None:
    pair.source.drain()
    assert await pair.asking == ([*script, 1], len(script) + 1)
    (begun,), (moved,) = pair.source.starts, pair.target.starts
    assert (moved.move_from.key, moved.move_from.address) == (begun.key, pair.source.address)
    assert list(moved.output_token_ids) == script[:HELD]
    assert await pair.counted('baton_router_moves_total{outcome="moved"} 1.0')


async def test_no_marker_is_needed_where_no_token_is_missing(pair: Pair, script: list[int]) -> None:
    pair.source.give_ahead = 0
    pair.source.drain()
    assert await pair.asking == ([*script, 1], len(script) + 1)
    assert len(pair.target.starts) == 1


async def test_tokens_that_never_came_are_generated_again(pair: Pair, script: list[int]) -> None:
    pair.source.give_ahead = 3
    pair.source.drain()
    assert await pair.asking == ([*script, 1], len(script) + 1)
    replayed = [start for worker in pair.workers for start in worker.starts][-1]
    assert list(replayed.output_token_ids) == script[:HELD]
    assert not replayed.HasField("move_from")


async def test_a_worker_that_refuses_is_asked_again(pair: Pair, script: list[int]) -> None:
    pair.target.errors = [Kind(kind=Kind.HANDOFF_FAILED, message="no room")]
    pair.source.drain()
    assert await pair.asking == ([*script, 1], len(script) + 1)
    assert len(pair.target.starts) == 2


async def test_what_ends_before_it_moves_has_ended(pair: Pair, script: list[int]) -> None:
    pair.target.drain()
    await until(lambda: pair.target.worker_id in pair.router.router.sessions.draining)
    pair.source.drain()
    pair.source.go_on.set()
    assert await pair.asking == ([*script, 1], len(script) + 1)
    assert not pair.target.starts
