"""GET and POST /debug/route: where a request would go and why, without sending it."""

from __future__ import annotations

import httpx
import pytest

from baton.kv.events import Stored, WorkerEvents
from baton.kv.hashing import extend_chain
from tests.unit.router.fakes import LAYOUT, FakeWorker, RunningRouter, running_router

PROMPT = list(range(2, 162))


@pytest.fixture
async def router(worker: FakeWorker):
    async with running_router(worker, policy="prefix") as up:
        yield up


@pytest.fixture
async def http(router: RunningRouter):
    async with httpx.AsyncClient(base_url=router.own_url, timeout=60) as client:
        yield client


async def test_a_dry_run_names_the_choice_its_terms_and_what_is_held(
    http: httpx.AsyncClient, router: RunningRouter, worker: FakeWorker
) -> None:
    chain = extend_chain(LAYOUT.root(""), PROMPT, 16)
    router.cluster.index.apply(WorkerEvents("decode-0", "one", 1, True, (Stored(chain[:5]),)))
    body = {"prompt": PROMPT, "max_tokens": 4}
    answer = await http.post("/debug/route", json=body, headers={"x-session-id": "s", "x-baton-slo": "batch"})
    assert answer.status_code == 200
    route = answer.json()
    assert (route["policy"], route["prompt_tokens"], route["prompt_blocks"]) == ("prefix", 160, 10)
    assert (route["slo"], route["session"], route["session_worker"]) == ("batch", "s", None)
    assert route["held_blocks"] == {"decode-0": 5}
    assert route["waiting"] == {"interactive": 0, "batch": 0}
    (chosen,) = route["candidates"]
    assert chosen["chosen"] is True
    assert (chosen["decode"]["worker"], chosen["prefill"], chosen["compute_tokens"]) == ("decode-0", None, 80)
    assert chosen["decode"]["held_blocks"]["device"] == 5
    assert {"queue_s", "compute_s", "transfer_s", "decode_s"} <= chosen["terms"].keys()
    assert worker.starts == [], "nothing was placed"
    other = await http.post("/debug/route", json={**body, "cache_salt": "mine"})
    assert other.json()["held_blocks"] == {}


async def test_a_chat_and_a_query_are_explained_too(http: httpx.AsyncClient) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    assert (await http.post("/debug/route", json=chat)).json()["prompt_tokens"] > 1
    assert (await http.get("/debug/route", params={"prompt": "Hello"})).json()["candidates"]


@pytest.mark.parametrize(
    ("body", "field"), [(b"{", "body"), (b'{"messages": []}', "messages"), (b'{"prompt": ""}', "prompt")]
)
async def test_what_cannot_be_explained_is_named(http: httpx.AsyncClient, body: bytes, field: str) -> None:
    refused = await http.post("/debug/route", content=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert (await http.get("/debug/route")).status_code == 400
