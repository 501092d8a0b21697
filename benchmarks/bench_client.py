"""What `baton bench` itself costs: streamed tokens per second that one core of the client can take in.

    python benchmarks/bench_client.py [--quick]

The server, in a process of its own, writes one token to each of 64 streams every few milliseconds, so that
every token is a read of its own, as it is of a real server. What the client's process then takes of CPU per
token says how many tokens per second one core can take in before the client measures itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

import uvloop
from aiohttp import web
from rich.console import Console

from baton import __version__
from baton.bench.client import Client
from baton.bench.drive import closed_loop
from baton.bench.http_client import HttpClient
from baton.bench.load import LoadRequest
from baton.bench.summary import summarize

GOAL_TOKENS_PER_S = 5000
TOKENS = 64
STREAMS = 64
STEP_S = 0.02
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":'
    b'[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)


def serve(pipe: Connection) -> None:
    """Run the server until killed; says on which port."""

    async def answer(request: web.Request) -> web.StreamResponse:
        tokens = (await request.json())["max_tokens"]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(tokens):
            await response.write(EVENT)
            await asyncio.sleep(STEP_S)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    uvloop.run(main())


async def measure(client: Client, requests: int) -> tuple[int, float]:
    """Tokens that came, and seconds of this process's CPU that they took."""
    load = [LoadRequest(0.0, "a prompt", 2, TOKENS) for _ in range(requests)]
    async with client as open_client:
        await closed_loop(open_client, load[:STREAMS], STREAMS, lambda record: None)
        began_s = time.process_time()
        records = await closed_loop(open_client, load, STREAMS, lambda record: None)
        spent_s = time.process_time() - began_s
    summary = summarize(records)
    if summary.failed:
        raise SystemExit(f"{summary.failed} requests failed: {summary.errors}")
    return sum(record.output_tokens for record in records), spent_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 requests instead of 2048")
    requests = 256 if parser.parse_args().quick else 2048
    pipe, theirs = get_context("spawn").Pipe()
    server = get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    try:
        port = pipe.recv()
        client = HttpClient(f"http://127.0.0.1:{port}", "completions", "m")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            tokens, spent_s = runner.run(measure(client, requests))
    finally:
        server.kill()
        server.join()
    rate = round(tokens / spent_s)
    Console().print(
        f"{tokens} tokens of {requests} streams, {STREAMS} at a time: {spent_s:.2f} s of CPU, "
        f"{1e6 * spent_s / tokens:.0f} us per token, {rate} tokens per second and core",
        highlight=False,
    )
    figure = {
        "figure": "client_tokens_per_s_per_core",
        "value": rate,
        "unit": "tokens/s",
        "goal": f">= {GOAL_TOKENS_PER_S}",
        "met": rate >= GOAL_TOKENS_PER_S,
    }
    report = {
        "benchmark": "bench_client",
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"baton": __version__, "python": platform.python_version()},
        "figures": [figure],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
