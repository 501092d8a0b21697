"""A worker that the registry has given up loses its requests once it is silent here too, not before."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.unit.router.conftest import ANSWER
from tests.unit.router.fakes import FakeWorker, running_router, running_worker

ASK = {"prompt": "Hi", "max_tokens": 400}


async def test_requests_go_on_elsewhere_while_the_connection_still_stands(
    script: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.sessions._DOUBT_S", 0.2)
    stalled, spare = FakeWorker("decode-0", script), FakeWorker("decode-1", script)
    async with (
        running_worker(stalled),
        running_worker(spare),
        running_router(stalled, spare) as router,
        httpx.AsyncClient(base_url=router.base_url, timeout=60) as client,
    ):
        stalled.hold_at = 3
        asking = [asyncio.create_task(client.post("/v1/completions", json=ASK)) for _ in range(4)]
        await stalled.wait_for("len(self.running) == 2")
        del router.cluster.workers["decode-0"]  # type: ignore[attr-defined]
        router.router.on_workers()
        answers = [(await one).json()["choices"][0]["text"] for one in asking]
        assert answers == [ANSWER] * 4
        assert len(spare.starts) == 4
        await stalled.wait_for("not self.running")


async def test_a_worker_that_is_silent_for_a_while_stays_when_the_registry_knows_it(
    script: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.sessions._DOUBT_S", 0.0)
    slow = FakeWorker("decode-0", script)
    async with (
        running_worker(slow),
        running_router(slow) as router,
        httpx.AsyncClient(base_url=router.base_url, timeout=60) as client,
    ):
        slow.hold_at = 3
        asking = asyncio.create_task(client.post("/v1/completions", json=ASK))
        await slow.wait_for("len(self.running) == 1")
        router.router.on_workers()
        slow.go_on.set()
        assert (await asking).json()["choices"][0]["text"] == ANSWER
        assert len(slow.starts) == 1
