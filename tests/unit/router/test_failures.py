"""What clients see when workers fail, clients leave, or there is too much to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from baton.routing import Role
from baton.rpc.v1 import worker_pb2
from tests.unit.router.conftest import ANSWER
from tests.unit.router.fakes import FakeWorker, RunningRouter, known, running_router, running_worker
from tests.waiting import until

C = "/v1/completions"
ASK = {"prompt": "Hi", "max_tokens": 400}
Kind = worker_pb2.RequestError


@pytest.fixture
async def pair(script: list[int]) -> AsyncIterator[tuple[FakeWorker, FakeWorker]]:
    async with AsyncExitStack() as stack:
        names = ("decode-0", "decode-1")
        first, second = [
            await stack.enter_async_context(running_worker(FakeWorker(n, script))) for n in names
        ]
        yield first, second


@pytest.fixture
async def both(pair: tuple[FakeWorker, FakeWorker]) -> AsyncIterator[tuple[httpx.AsyncClient, RunningRouter]]:
    prefill = known("prefill-0", "127.0.0.1:9", Role.PREFILL)
    async with (
        running_router(*pair, prefill) as router,
        httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
    ):
        yield client, router


async def test_a_broken_session_goes_on_elsewhere_without_a_lost_or_doubled_token(
    both: tuple[httpx.AsyncClient, RunningRouter], pair: tuple[FakeWorker, FakeWorker], script: list[int]
) -> None:
    client, _ = both
    for worker in pair:
        worker.break_at = 7
    async with client.stream("POST", C, json={**ASK, "stream": True, "return_token_ids": True}) as response:
        lines = [line[6:] async for line in response.aiter_lines() if line]
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == ANSWER
    assert [i for chunk in chunks for i in chunk["token_ids"]] == [*script, 1]
    starts = [start for worker in pair for start in worker.starts]
    assert sorted(len(start.output_token_ids) for start in starts)[:2] == [0, 7]
    assert len({start.sampling.seed for start in starts}) == 1
    assert len({start.request_id for start in starts}) == 1
    page = (await client.get("/metrics")).text
    assert 'baton_router_replacements_total{reason="session_broken"}' in page


async def test_the_only_worker_is_used_again_when_it_comes_back(
    http: httpx.AsyncClient, worker: FakeWorker
) -> None:
    worker.break_at = 5
    response = await http.post(C, json=ASK)
    assert response.json()["choices"][0]["text"] == ANSWER
    assert [len(start.output_token_ids) for start in worker.starts] == [0, 5]


async def test_connections_that_break_again_and_again_cost_no_request(
    http: httpx.AsyncClient, worker: FakeWorker
) -> None:
    worker.break_at, worker.breaks = 5, 6
    response = await http.post(C, json=ASK)
    assert response.json()["choices"][0]["text"] == ANSWER
    assert [len(start.output_token_ids) for start in worker.starts] == [0, 5, 5, 5, 5, 5, 5]


async def test_a_failed_handoff_avoids_the_prefill_worker(
    both: tuple[httpx.AsyncClient, RunningRouter], pair: tuple[FakeWorker, FakeWorker]
) -> None:
    client, _ = both
    for worker in pair:
        worker.errors = [Kind(kind=Kind.HANDOFF_FAILED, message="gone")]
    response = await client.post(C, json=ASK)
    assert response.json()["choices"][0]["text"] == ANSWER
    starts = [start for worker in pair for start in worker.starts]
    assert [start.prefill_address for start in starts].count("127.0.0.1:9") == 1
    assert response.headers["x-baton-prefill"] == "local"
    assert "x-baton-prefill-worker" not in response.headers


async def test_requests_keep_away_from_a_worker_whose_handoffs_break(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.suspects._FIRST_S", 60.0)
    prefill = known("prefill-0", "127.0.0.1:9", Role.PREFILL)
    worker.errors = [Kind(kind=Kind.HANDOFF_FAILED, message="gone")]
    async with (
        running_router(worker, prefill) as router,
        httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
    ):
        for _ in range(3):
            assert (await client.post(C, json=ASK)).json()["choices"][0]["text"] == ANSWER
        assert [start.prefill_address for start in worker.starts] == ["127.0.0.1:9", "", "", ""]
        page = (await client.get("/metrics")).text
        assert 'baton_router_backoffs_total{reason="handoff_failed"} 1.0' in page
        assert "baton_router_workers_backed_off 1.0" in page
        explained = (await client.get("/debug/route", params={"prompt": "Hi"})).json()
        assert explained["backed_off"] == ["prefill-0"]
        assert [candidate["prefill"] for candidate in explained["candidates"]] == [None]
        router.router.on_gone("prefill-0")
        assert (await client.post(C, json=ASK)).headers["x-baton-prefill"] == "remote"


async def test_the_answer_says_who_prefilled(both: tuple[httpx.AsyncClient, RunningRouter]) -> None:
    client, _ = both
    response = await client.post(C, json=ASK)
    assert response.headers["x-baton-prefill"] == "remote"
    assert response.headers["x-baton-prefill-worker"] == "prefill-0"


@pytest.mark.parametrize("kind", [Kind.OVERLOADED, Kind.DRAINING])
async def test_a_worker_that_refuses_is_passed_over(
    both: tuple[httpx.AsyncClient, RunningRouter], pair: tuple[FakeWorker, FakeWorker], kind: int
) -> None:
    client, _ = both
    for worker in pair:
        worker.errors = [Kind(kind=kind, message="no")]
    response = await client.post(C, json=ASK)
    assert response.json()["choices"][0]["text"] == ANSWER
    tried = [start.request_id for worker in pair for start in worker.starts]
    assert len(tried) == 3


async def test_workers_that_all_stay_full_are_a_429(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.errors = [Kind(kind=Kind.OVERLOADED, message="the queue is full")] * 9
    response = await http.post(C, json=ASK)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert len(worker.starts) == 4


async def test_what_a_worker_calls_invalid_is_a_400(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.errors = [Kind(kind=Kind.INVALID, message="too long for the pool")]
    response = await http.post(C, json=ASK)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "too long for the pool")


async def test_a_worker_that_breaks_inside_is_a_500_and_says_which(
    http: httpx.AsyncClient, worker: FakeWorker
) -> None:
    worker.errors = [Kind(kind=Kind.INTERNAL, message="no such kernel")]
    response = await http.post(C, json=ASK)
    assert response.status_code == 500
    assert "decode-0" in response.json()["error"]["message"]


async def test_a_failure_in_mid_stream_is_an_error_event(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.break_at = 3
    worker.hold_at = 2
    async with http.stream("POST", C, json={**ASK, "stream": True}) as response:
        lines = response.aiter_lines()
        await anext(lines)
        worker.errors = [Kind(kind=Kind.INTERNAL, message="oh")]
        worker.go_on.set()
        rest = [line async for line in lines if line]
    assert "error" in json.loads(rest[-2][6:])
    assert rest[-1] == "data: [DONE]"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_work(
    router: RunningRouter, worker: FakeWorker, n: int, stream: bool
) -> None:
    worker.hold_at = 3
    async with httpx.AsyncClient(base_url=router.own_url, timeout=60) as client:
        asking = asyncio.create_task(client.post(C, json={**ASK, "n": n, "stream": stream}))
        await worker.wait_for(f"len(self.starts) == {n}")
        asking.cancel()
        await asyncio.wait([asking])
    await worker.wait_for(f"len(self.cancelled) == {n}")
    await worker.wait_for("not self.running")
    async with httpx.AsyncClient(base_url=router.own_url, timeout=60) as client:
        page = (await client.get("/metrics")).text
    assert 'vllm:num_requests_running{model_name="baton-small"} 0.0' in page


async def test_one_failed_choice_cancels_the_others(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.hold_at = 0
    asking = asyncio.create_task(http.post(C, json={**ASK, "n": 2}))
    await worker.wait_for("len(self.starts) == 1")
    worker.errors = [Kind(kind=Kind.INVALID, message="no")]
    worker.go_on.set()
    assert (await asking).status_code == 400
    await worker.wait_for("not self.running")


async def test_choices_of_one_prompt_wait_until_its_kv_is_there(
    http: httpx.AsyncClient, worker: FakeWorker
) -> None:
    worker.hold_at = 0
    asking = asyncio.create_task(http.post(C, json={**ASK, "prompt": ["a", "b"], "n": 3}))
    await worker.wait_for("len(self.starts) == 2")
    first, second = (list(start.prompt_token_ids) for start in worker.starts)
    assert first != second
    worker.go_on.set()
    assert len((await asking).json()["choices"]) == 6


async def test_too_many_requests_are_refused_before_any_work(worker: FakeWorker) -> None:
    worker.hold_at = 1
    async with (
        running_router(worker, max_running=2, max_queued=0) as router,
        httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
    ):
        asking = asyncio.create_task(client.post(C, json={**ASK, "n": 2}))
        await worker.wait_for("len(self.starts) == 2")
        refused = await client.post(C, json=ASK)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        never = await client.post(C, json={**ASK, "n": 3})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        worker.go_on.set()
        assert (await asking).status_code == 200
        assert (await client.post(C, json=ASK)).status_code == 200
        assert len(worker.starts) == 3


async def test_a_request_has_a_deadline(worker: FakeWorker) -> None:
    worker.hold_at = 2
    async with (
        running_router(worker, request_timeout_s=0.3) as router,
        httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
    ):
        response = await client.post(C, json=ASK)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        await worker.wait_for("len(self.cancelled) == 1")


async def test_without_workers_the_router_is_alive_and_not_ready() -> None:
    prefill = known("prefill-0", "127.0.0.1:9", Role.PREFILL)
    async with (
        running_router(prefill) as router,
        httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
    ):
        assert (await client.get("/health")).status_code == 200
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert "decode worker" in ready.json()["error"]["message"]
        assert (await client.post(C, json=ASK)).status_code == 503


async def test_a_new_request_waits_a_moment_for_the_only_decode_worker(worker: FakeWorker) -> None:
    async with (
        running_router() as router,
        httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
    ):
        asking = asyncio.create_task(client.post(C, json=ASK))
        await until(lambda: router.router.recent.running)
        router.cluster.workers[worker.worker_id] = known(worker.worker_id, worker.address)
        router.router.on_workers()
        assert (await asking).json()["choices"][0]["text"] == ANSWER


async def test_the_context_is_what_the_largest_worker_can_hold(worker: FakeWorker) -> None:
    small = known("decode-0", worker.address, total_blocks=4)
    async with (
        running_router(small) as router,
        httpx.AsyncClient(base_url=router.own_url, timeout=60) as client,
    ):
        response = await client.post(C, json={"prompt": [5] * 64})
        assert response.json()["error"]["code"] == "context_length_exceeded"
        chat = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
        usage = (await client.post("/v1/chat/completions", json=chat)).json()["usage"]
        assert usage["total_tokens"] == 64


async def test_a_stopping_router_finishes_what_it_has_begun(worker: FakeWorker) -> None:
    worker.hold_at = 2
    async with httpx.AsyncClient(timeout=60) as client:
        async with running_router(worker, stop_grace_s=5.0) as router:
            asking = asyncio.create_task(client.post(router.base_url + C, json=ASK))
            await worker.wait_for("len(self.starts) == 1")
            asyncio.get_running_loop().call_later(0.2, worker.go_on.set)
        assert (await asking).json()["choices"][0]["text"] == ANSWER


async def test_a_stopping_router_does_not_wait_for_ever(worker: FakeWorker) -> None:
    worker.hold_at = 2
    async with httpx.AsyncClient(timeout=60) as client:
        async with running_router(worker, stop_grace_s=0.1) as router:
            asking = asyncio.create_task(client.post(router.base_url + C, json=ASK))
            await worker.wait_for("len(self.starts) == 1")
        assert (await asking).status_code == 503
        assert (await asking).json()["error"]["message"].startswith("the router is shutting down")
        await worker.wait_for("self.sessions == 0")


async def test_two_hundred_streams_with_random_cancels_leave_nothing_behind(
    both: tuple[httpx.AsyncClient, RunningRouter], pair: tuple[FakeWorker, FakeWorker]
) -> None:
    _, router = both
    before = len(asyncio.all_tasks())

    async def one(at: int) -> None:
        async with client.stream("POST", C, json={**ASK, "stream": True}) as response:
            lines = []
            async for line in response.aiter_lines():
                lines.append(line)
                if at % 3 == 0 and len(lines) > at % 20:
                    return
            assert "data: [DONE]" in lines

    limits = httpx.Limits(max_connections=50)
    async with (
        httpx.AsyncClient(base_url=router.own_url, timeout=30, limits=limits) as client,
        asyncio.TaskGroup() as tasks,
    ):
        for at in range(200):
            tasks.create_task(one(at))
    for worker in pair:
        await worker.wait_for("not self.running")
    await until(lambda: len(asyncio.all_tasks()) <= before)
    for session in router.router.sessions._sessions.values():
        assert session.idle
