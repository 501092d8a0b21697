"""The load and the instant backends of `benchmarks/router.py`: nothing here waits, unless it is paced."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, cast

import grpc
import uvloop

from baton.kv.events import Event
from baton.rpc.kvstore_client import WorkerMembership
from baton.rpc.server import Server
from baton.rpc.v1 import inference_pb2, kvstore_pb2, worker_pb2, worker_pb2_grpc

PROMPT_CHARACTERS = 2048
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
)
_END = b"0\r\n\r\n"


class InstantWorker(worker_pb2_grpc.DecodeServicer):
    """A decode worker that answers at once: all tokens of the requests in a message come in one message, as
    the instant OpenAI servers write them."""

    async def Session(
        self,
        requests: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        load = _load()
        async for message in requests:
            step = worker_pb2.StepOutputs(load=load)
            for start in message.starts:
                for left in range(start.sampling.max_tokens, 0, -1):
                    _add_token(step, start.key, left, first=left == start.sampling.max_tokens)
            if step.outputs:
                await context.write(step)


class PacedWorker(worker_pb2_grpc.DecodeServicer):
    """A decode worker whose steps take `step_s`, with one message per step for all requests."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def Session(
        self,
        requests: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        left: dict[int, int] = {}
        fresh: set[int] = set()

        async def read() -> None:
            async for message in requests:
                for start in message.starts:
                    left[start.key] = start.sampling.max_tokens
                    fresh.add(start.key)
                for key in message.cancelled_keys:
                    left.pop(key, None)

        load = _load()
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read())
            while not reading.done():
                await asyncio.sleep(self._step_s)
                load.running = len(left)
                step = worker_pb2.StepOutputs(load=load)
                for key in list(left):
                    _add_token(step, key, left[key], first=key in fresh)
                    fresh.discard(key)
                    left[key] -= 1
                    if not left[key]:
                        del left[key]
                if step.outputs:
                    await context.write(step)


def _load() -> worker_pb2.WorkerLoad:
    return worker_pb2.WorkerLoad(total_blocks=1 << 20, free_blocks=1 << 20)


def _add_token(step: worker_pb2.StepOutputs, key: int, left: int, *, first: bool) -> None:
    output = step.outputs.add(key=key, token_ids=[300 + left % 200])
    if first:
        output.prefill.kind = worker_pb2.PrefillReport.LOCAL
    if left == 1:
        output.finish_reason = inference_pb2.FINISH_REASON_LENGTH


def serve_workers(pipe: Connection, kvstore: str, count: int, step_s: float) -> None:
    """Run `count` workers, registered at `kvstore`, until killed; says when they serve. They are instant, or
    take `step_s` seconds for a step."""

    stack, tasks = AsyncExitStack(), asyncio.TaskGroup()

    async def snapshot() -> Sequence[Event]:
        return []

    async def one(number: int) -> None:
        server = await stack.enter_async_context(Server())
        worker = PacedWorker(step_s) if step_s else InstantWorker()
        server.add(worker_pb2_grpc.add_DecodeServicer_to_server, worker, "baton.v1.Decode")
        port = server.bind("127.0.0.1", 0, flag="--worker-port")
        await server.start()
        described = kvstore_pb2.Worker(
            worker_id=f"instant-{number}",
            incarnation="one",
            address=f"127.0.0.1:{port}",
            role=worker_pb2.ROLE_HYBRID,
            layout=worker_pb2.KvLayout(
                model_fingerprint="f", dtype="float32", block_size=16, block_bytes=65536
            ),
            max_model_len=1 << 20,
            total_blocks=1 << 20,
            prefill_curve=[kvstore_pb2.CurvePoint(size=512, seconds=1e-5)],
            decode_curve=[kvstore_pb2.CurvePoint(size=1, seconds=1e-6)],
        )
        tasks.create_task(WorkerMembership(kvstore, described, snapshot).run())

    async def main() -> None:
        async with stack, tasks:
            for number in range(count):
                await one(number)
            pipe.send("serving")

    uvloop.run(main())


class _InstantOpenAi(asyncio.Protocol):
    """An OpenAI server that answers every completion with `max_tokens` chunks, each written on its own."""

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:

        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            self._answer(head.split(b" ", 2)[1], body)

    def _answer(self, path: bytes, body: bytes) -> None:
        if not path.endswith(b"completions"):
            shape: dict[str, Any] = {"status": "ok"}
            if path.endswith(b"models"):
                shape = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "x"}]}
            if b"info" in path:
                shape = {"model_path": "m", "served_model_name": "m", "is_generation": True}
            answer = json.dumps(shape).encode()
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (len(answer), answer)
            )
            return
        tokens = json.loads(body)["max_tokens"]
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for at in range(tokens):
            reason = '"length"' if at + 1 == tokens else "null"
            event = (
                'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":'
                f'[{{"index":0,"text":" word","logprobs":null,"finish_reason":{reason}}}]}}\n\n'
            ).encode()
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        self._transport.write(b"e\r\ndata: [DONE]\n\n\r\n" + _END)


def serve_openai(pipe: Connection, ports: Sequence[int]) -> None:
    """Run instant OpenAI servers on `ports` until killed; says when they serve."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for port in ports:
            await loop.create_server(_InstantOpenAi, "127.0.0.1", port)
        pipe.send("serving")
        await asyncio.Event().wait()

    uvloop.run(main())


@dataclass
class Load:
    """What a number of clients saw, in seconds: to the first event, to the end, between events."""

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0


class _Client(asyncio.Protocol):
    """One keep-alive connection, one streamed request at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._tail = b""
        self._done: asyncio.Future[None] | None = None
        self._last_s = 0.0
        self._seen = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:

        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"closed after {self._tail!r}"))

    async def ask(self, request: bytes) -> None:
        self._done = asyncio.get_running_loop().create_future()
        self._seen, self._tail = False, b""
        began_s = self._last_s = time.perf_counter()
        self._began_s = began_s
        self.transport.write(request)
        async with asyncio.timeout(60):
            await self._done
        self._load.whole_s.append(time.perf_counter() - began_s)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if not self._seen:
            if b"data: " not in data:
                if not data.startswith(b"HTTP/1.1 200"):
                    self._done and self._done.set_exception(ConnectionError(data[:500].decode()))
                return
            self._seen = True
            self._load.first_s.append(now_s - self._began_s)
        else:
            self._load.gaps_s.append(now_s - self._last_s)
        self._last_s = now_s
        self._tail = self._tail[-32:] + data
        if self._tail.endswith(_END) and self._done is not None and not self._done.done():
            self._done.set_result(None)


async def put_load(port: int, model: str, *, clients: int, requests: int, tokens: int) -> Load:
    """`requests` completions of a prompt that no two share, from so many clients, as fast as they go."""
    loop, load, left = asyncio.get_running_loop(), Load(), itertools.count()
    rng = random.Random(tokens)

    def request() -> bytes:
        words = rng.choices(WORDS, k=PROMPT_CHARACTERS // 3)
        prompt = " ".join(words)[:PROMPT_CHARACTERS]
        body = json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True}).encode()
        return (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )

    prepared = [request() for _ in range(requests)]

    async def client() -> None:
        _, connection = await loop.create_connection(lambda: _Client(load), "127.0.0.1", port)
        while (at := next(left)) < requests:
            await connection.ask(prepared[at])
        connection.transport.close()

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    load.elapsed_s = time.perf_counter() - began_s
    return load
