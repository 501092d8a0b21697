"""Puts the load on: open loop by the clock, or closed loop with so many requests in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator

from baton.bench.client import Arrivals, Client
from baton.bench.load import LoadRequest
from baton.bench.records import Records, RequestRecord

Progress = Callable[[RequestRecord], None]
"""Called with each request that is over."""

_LEAD_S = 0.05


async def open_loop(client: Client, requests: Iterable[LoadRequest], progress: Progress) -> Records:
    """Send every request when it is due, whatever became of those before it.

    Latencies count from when a request was due, so neither a slow server nor a slow client can hide
    queueing; by how much the client was late is in the records too.
    """
    run = _Run(client, progress, time.perf_counter() + _LEAD_S)
    async with asyncio.TaskGroup() as tasks:
        for request in requests:
            if (left_s := request.at_s - run.now_s()) > 0:
                await asyncio.sleep(left_s)
            tasks.create_task(run.one(request, request.at_s))
    return run.records


async def closed_loop(
    client: Client, requests: Iterable[LoadRequest], concurrency: int, progress: Progress
) -> Records:
    """Keep `concurrency` requests in flight until there are no more. A request is due when it is sent."""
    run = _Run(client, progress, time.perf_counter())
    left: Iterator[LoadRequest] = iter(requests)

    async def one_after_another() -> None:
        for request in left:
            await run.one(request, run.now_s())

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(one_after_another())
    return run.records


def until(requests: Iterable[LoadRequest], duration_s: float) -> Iterator[LoadRequest]:
    """The requests that are taken within so many seconds of the first: how long a closed loop goes on."""
    end_s = time.perf_counter() + duration_s
    for request in requests:
        if time.perf_counter() >= end_s:
            return
        yield request


class _Run:
    def __init__(self, client: Client, progress: Progress, began_s: float) -> None:
        self.records = Records()
        self._client = client
        self._progress = progress
        self._began_s = began_s

    def now_s(self) -> float:
        return time.perf_counter() - self._began_s

    async def one(self, request: LoadRequest, scheduled_s: float) -> None:
        sent_s = self.now_s()
        tokens = Arrivals()
        failed = await self._client.send(request, tokens, self.now_s)
        record = tokens.record(request, scheduled_s, sent_s, failed, self.records.gaps)
        self.records.append(record)
        self._progress(record)
