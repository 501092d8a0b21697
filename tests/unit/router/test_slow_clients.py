"""Clients that send too much, too slowly, or nothing: each is told so or let go, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from tests.unit.router.fakes import FakeWorker, RunningRouter, running_router

HEAD_TIMEOUT_S = 0.3
MAX_BYTES = 64 * 1024
LINE = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"


@pytest.fixture
async def router(worker: FakeWorker) -> AsyncIterator[RunningRouter]:
    async with running_router(worker, head_timeout_s=HEAD_TIMEOUT_S, max_body_bytes=MAX_BYTES) as up:
        yield up


@asynccontextmanager
async def connection(
    router: RunningRouter,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", router.router.http_port)
    try:
        async with asyncio.timeout(60):
            yield reader, writer
    finally:
        writer.close()


async def drip(writer: asyncio.StreamWriter, piece: Callable[[], bytes]) -> None:
    """Send for ever, always soon enough not to look idle."""
    while True:
        writer.write(piece())
        await writer.drain()
        await asyncio.sleep(HEAD_TIMEOUT_S / 20)


async def answer_to(
    router: RunningRouter, began: bytes, then: Callable[[asyncio.StreamWriter], Awaitable[None]]
) -> bytes:
    """What the router says, until it hangs up, to a client that goes on sending."""
    async with connection(router) as (reader, writer), asyncio.TaskGroup() as tasks:
        writer.write(began)
        sending = tasks.create_task(_quietly(then(writer)))
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""
        sending.cancel()
    return answer


async def _quietly(sending: Awaitable[None]) -> None:
    try:
        await sending
    except ConnectionError:
        return


def check(answer: bytes, status: int, param: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_headers_that_never_end_are_given_up_in_time(router: RunningRouter) -> None:
    answer = await answer_to(router, LINE, lambda writer: drip(writer, lambda: b"x: y\r\n"))
    check(answer, 408, "headers")


async def test_one_header_that_never_ends_is_given_up_in_time(router: RunningRouter) -> None:
    answer = await answer_to(router, LINE + b"x-long: ", lambda writer: drip(writer, lambda: b"y"))
    check(answer, 408, "headers")


async def test_empty_lines_for_ever_are_given_up_in_time(router: RunningRouter) -> None:
    assert await answer_to(router, b"", lambda writer: drip(writer, lambda: b"\r\n")) == b""


async def test_headers_beyond_64_kib_are_refused(router: RunningRouter) -> None:
    long = LINE + b"x-long: " + b"y" * MAX_BYTES
    check(await answer_to(router, long, lambda writer: drip(writer, lambda: b"y")), 431, "headers")


async def test_a_connection_that_waits_between_requests_is_kept(router: RunningRouter) -> None:
    async with connection(router) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            await reader.readexactly(len(b'{"status":"ok"}'))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2 * HEAD_TIMEOUT_S):
                    await reader.read(1)


async def test_a_long_answer_outlives_the_time_for_headers(router: RunningRouter, worker: FakeWorker) -> None:
    worker.hold_at = 2
    async with httpx.AsyncClient(base_url=router.base_url, timeout=60) as client:
        asked = asyncio.create_task(client.post("/v1/completions", json={"prompt": [5], "max_tokens": 4}))
        await worker.wait_for("len(self.starts) == 1")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * HEAD_TIMEOUT_S):
                await asyncio.shield(asked)
        worker.go_on.set()
        assert (await asked).json()["usage"]["completion_tokens"] == 4


async def test_a_grpc_message_beyond_the_bound_is_refused(router: RunningRouter, worker: FakeWorker) -> None:
    async with grpc.aio.insecure_channel(router.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Tokenize(inference_pb2.TokenizeRequest(text="a" * (MAX_BYTES + 1)), timeout=60)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Tokenize(inference_pb2.TokenizeRequest(text="a"), timeout=60)).token_ids
    assert worker.starts == []


async def test_a_prompt_too_long_is_refused_before_it_is_tokenized(
    router: RunningRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = router.router.model.tokenizer
    assert tokenizer is not None
    seen: list[int] = []
    encode = tokenizer.encode

    def noting(text: str, *, add_special_tokens: bool) -> list[int]:
        seen.append(len(text))
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", noting)
    monkeypatch.setattr(tokenizer, "_longest_token", 2)
    async with httpx.AsyncClient(base_url=router.base_url, timeout=60) as client:
        for body in ({"prompt": "a" * 50_000}, {"messages": [{"role": "user", "content": "a" * 50_000}]}):
            path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
            refused = await client.post(path, json=body)
            assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert seen == []
        assert (await client.post("/tokenize", json={"prompt": "a" * 50_000})).status_code == 200
