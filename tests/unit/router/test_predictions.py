"""What the router makes of predictions: pulls it asks for, and what it learns from prefills."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import httpx
import pytest

from baton.kv.events import Stored, WorkerEvents
from baton.kv.hashing import extend_chain
from baton.routing import Curve
from services.router.cluster import KnownWorker
from tests.unit.router.fakes import LAYOUT, FakeWorker, RunningRouter, known, running_router, running_worker

PROMPT = [5] * 20 * LAYOUT.block_size
CURVE = Curve(((16.0, 0.1), (1024.0, 6.4)))
ASK = {"prompt": PROMPT, "max_tokens": 3}


def measured(worker: FakeWorker, **changes: object) -> KnownWorker:
    entry = known(worker.worker_id, worker.address)
    view = replace(
        entry.view,
        prefill_curve=CURVE,
        decode_curve=Curve(((1.0, 0.01), (64.0, 0.2))),
        read_bytes_per_s={"holder": 1e9, "idle": 1e9},
        **changes,  # type: ignore[arg-type]
    )
    return replace(entry, view=view)


@pytest.fixture
async def pair(script: list[int]) -> AsyncIterator[tuple[FakeWorker, FakeWorker]]:
    async with AsyncExitStack() as stack:
        holder, idle = [
            await stack.enter_async_context(running_worker(FakeWorker(name, script)))
            for name in ("holder", "idle")
        ]
        yield holder, idle


@pytest.fixture
async def router(pair: tuple[FakeWorker, FakeWorker]) -> AsyncIterator[RunningRouter]:
    """The worker `holder` holds 18 of the prompt's 20 blocks and has its hands full."""
    holder, idle = pair
    workers = (measured(holder, running=40, queued_tokens=4000), measured(idle))
    async with running_router(*workers, policy="prefix") as running:
        chain = extend_chain(LAYOUT.root(), PROMPT, LAYOUT.block_size)[:18]
        running.cluster.index.apply(WorkerEvents("holder", "one", 1, True, (Stored(chain),)))
        yield running


async def ask(router: RunningRouter) -> None:
    async with httpx.AsyncClient(base_url=router.own_url, timeout=60) as client:
        (await client.post("/v1/completions", json=ASK)).raise_for_status()


async def test_a_worker_is_told_what_to_pull_and_from_whom(
    pair: tuple[FakeWorker, FakeWorker], router: RunningRouter
) -> None:
    holder, idle = pair
    await ask(router)
    assert not holder.starts
    (start,) = idle.starts
    assert (start.pull.address, start.pull.incarnation, start.pull.blocks) == (holder.address, "one", 18)


async def test_predictions_are_compared_with_what_happened(router: RunningRouter) -> None:
    await ask(router)
    async with httpx.AsyncClient(base_url=router.own_url, timeout=60) as client:
        page = (await client.get("/metrics")).text
    assert "baton_router_prediction_error_seconds_count" in page
    count = next(line for line in page.splitlines() if "prediction_error_seconds_count" in line)
    assert count.endswith(" 1.0")
