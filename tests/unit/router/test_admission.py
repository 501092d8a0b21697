"""Requests that wait at the door: their turn, their patience, their tenants, and what the metrics say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from baton.config import BadSetting
from baton.rpc.channels import open_channel
from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from services.router.admission import parse_weights
from tests.unit.router.fakes import FakeWorker, RunningRouter, running_router
from tests.waiting import until

C = "/v1/completions"
ASK = {"prompt": "Hello", "max_tokens": 3}


@asynccontextmanager
async def full(
    worker: FakeWorker, **settings: object
) -> AsyncIterator[tuple[RunningRouter, httpx.AsyncClient]]:
    """A router with one place, which a request has taken that goes on when the worker does."""
    worker.hold_at = 1
    async with (
        running_router(worker, max_running=1, **settings) as router,
        httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
    ):
        first = asyncio.create_task(client.post(C, json=ASK))
        await worker.wait_for("len(self.starts) == 1")
        yield router, client
        worker.go_on.set()
        assert (await first).status_code == 200


async def waiting(client: httpx.AsyncClient, number: int, slo: str = "interactive") -> None:
    line = f'baton_router_queue_requests{{slo="{slo}"}} {number:.1f}'

    async def seen() -> bool:
        return line in (await client.get("/metrics")).text

    await until(seen)


async def test_a_request_waits_for_a_place_and_says_how_long(worker: FakeWorker) -> None:
    async with full(worker) as (_, client):
        second = asyncio.create_task(client.post(C, json=ASK))
        await waiting(client, 1)
        assert "vllm:num_requests_waiting{model_name=" in (await client.get("/metrics")).text
        assert len(worker.starts) == 1
        worker.go_on.set()
        answer = await second
        assert answer.status_code == 200
        assert float(answer.headers["x-baton-queue-s"]) > 0
        assert float(answer.headers["x-baton-predicted-s"]) >= 0
        await waiting(client, 0)


async def test_batch_yields_and_tenants_take_turns(worker: FakeWorker) -> None:
    order: list[str] = []

    async with full(worker, trust_tenant_header=True) as (_, client):

        async def ask(name: str, tenant: str, **more: object) -> None:
            response = await client.post(C, json={**ASK, **more}, headers={"x-tenant-id": tenant})
            assert response.status_code == 200
            order.append(name)

        async with asyncio.TaskGroup() as tasks:
            for number, name in enumerate(("a1", "a2", "a3"), 1):
                tasks.create_task(ask(name, "a"))
                await waiting(client, number)
            tasks.create_task(ask("flex", "c", service_tier="flex"))
            await waiting(client, 1, "batch")
            tasks.create_task(ask("slo", "c", slo="batch"))
            await waiting(client, 2, "batch")
            tasks.create_task(ask("b1", "b"))
            await waiting(client, 4)
            worker.go_on.set()
    assert order[0] == "a1"
    assert order.index("b1") < order.index("a3"), "one tenant's queue is not another's"
    assert order[-2:] == ["flex", "slo"]


async def test_patience_ends_with_a_429_and_the_place_in_the_queue_is_free_again(worker: FakeWorker) -> None:
    async with full(worker, queue_timeout_s=0.1, max_queued=1) as (_, client):
        refused = await client.post(C, json=ASK)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        await waiting(client, 0)
        page = (await client.get("/metrics")).text
        assert 'baton_router_rejected_total{reason="queue_timeout"} 1.0' in page
        assert len(worker.starts) == 1


async def test_a_client_that_leaves_the_queue_is_never_placed(worker: FakeWorker) -> None:
    async with full(worker, max_queued=1) as (router, client):
        async with httpx.AsyncClient(base_url=router.own_url, timeout=60) as impatient:
            leaving = asyncio.create_task(impatient.post(C, json=ASK))
            await waiting(client, 1)
            full_queue = await client.post(C, json=ASK)
            assert full_queue.status_code == 429
            leaving.cancel()
        await waiting(client, 0)
        stays = asyncio.create_task(client.post(C, json=ASK))
        await waiting(client, 1)
        worker.go_on.set()
        assert (await stays).status_code == 200
        assert len(worker.starts) == 2
        assert 'baton_router_rejected_total{reason="queue_full"} 1.0' in (await client.get("/metrics")).text


async def test_a_tenant_is_believed_only_where_a_proxy_vouches_for_it(worker: FakeWorker) -> None:
    for settings, salts in (
        ({}, {""}),
        ({"tenant_isolation": True}, {"0:"}),
        ({"tenant_isolation": True, "trust_tenant_header": True}, {"1:a", "1:b"}),
    ):
        worker.starts.clear()
        async with (
            running_router(worker, **settings) as router,
            httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
        ):
            for tenant in "ab":
                assert (await client.post(C, json=ASK, headers={"x-tenant-id": tenant})).status_code == 200
        assert {start.cache_salt for start in worker.starts} == salts


async def test_grpc_callers_wait_by_their_metadata_and_deadline(worker: FakeWorker) -> None:
    async with full(worker) as (router, client), open_channel(router.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(text="Hello")
        request.sampling.max_tokens = 2
        call = stub.Generate(request, metadata=(("x-baton-slo", "batch"),), timeout=1.5)
        await waiting(client, 1, "batch")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await waiting(client, 0, "batch")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Generate(request, metadata=(("x-baton-slo", "soon"),)).read()
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("headers", "more", "field"),
    [
        ({"x-baton-slo": "soon"}, {}, "x-baton-slo"),
        ({}, {"slo": "soon"}, "slo"),
        ({"x-request-timeout": "-1"}, {}, "x-request-timeout"),
        ({"x-session-id": "x" * 300}, {}, "x-session-id"),
    ],
)
async def test_what_a_caller_cannot_be_is_named(
    http: httpx.AsyncClient, headers: dict[str, str], more: dict[str, str], field: str
) -> None:
    refused = await http.post(C, json={**ASK, **more}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


async def test_a_stopping_router_sends_the_waiting_away(worker: FakeWorker) -> None:
    async with full(worker) as (router, client):
        second = asyncio.create_task(client.post(C, json=ASK))
        await waiting(client, 1)
        router.router.frontend.door.close()
        assert (await second).status_code == 503


def test_weights_are_read() -> None:
    assert parse_weights(" a=2, b=0.5 ,") == {"a": 2.0, "b": 0.5}
    assert parse_weights("") == {}
    for bad in ("a", "a=0", "=1", "a=x", "a=inf"):
        with pytest.raises(BadSetting, match="tenant-weights"):
            parse_weights(bad)
