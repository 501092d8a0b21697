"""Parts of the router alone: models without a tokenizer, promised work, the listening socket."""

from __future__ import annotations

import logging
import shutil
import socket
import time
from pathlib import Path
from random import Random

import httpx
import pytest

from baton.config import BadSetting
from baton.kv.events import Stored, WorkerEvents
from baton.kv.hashing import extend_chain
from baton.kv.index import PrefixIndex
from baton.routing import Role, Unplaceable, create_policy
from baton.rpc.v1 import worker_pb2
from baton.sampling import Sampling
from services.router.caller import Caller
from services.router.generation import Generation
from services.router.http_server import listen
from services.router.placement import Placer
from services.router.sessions import SessionPool
from tests.unit.router.fakes import LAYOUT, MODEL, FakeCluster, FakeWorker, known, running_router


@pytest.fixture
def bare_model(tmp_path: Path) -> Path:
    """A model folder without a tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    return folder


async def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(
    worker: FakeWorker, script: list[int], bare_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        async with (
            running_router(worker, model=bare_model) as router,
            httpx.AsyncClient(base_url=router.base_url, timeout=60) as client,
        ):
            body = {"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True, "logprobs": 1}
            choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
            assert (choice["text"], choice["token_ids"]) == ("", script[:3])
            assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in script[:3]]
            text = await client.post("/v1/completions", json={"prompt": "Hi"})
            chat = await client.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]}
            )
            stop = await client.post("/v1/completions", json={"prompt": [5], "stop": "a"})
    for response, field in ((text, "prompt"), (chat, "messages"), (stop, "stop")):
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)
        assert "no tokenizer" in response.json()["error"]["message"]
    assert "no tokenizer.json" in caplog.text


async def test_a_model_without_a_template_takes_no_chats(worker: FakeWorker, bare_model: Path) -> None:
    shutil.copy(MODEL / "tokenizer.json", bare_model)
    async with (
        running_router(worker, model=bare_model) as router,
        httpx.AsyncClient(base_url=router.base_url, timeout=60) as client,
    ):
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        response = await client.post("/v1/chat/completions", json=body)
        assert "no chat template" in response.json()["error"]["message"]


async def test_accepted_sockets_send_at_once(worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.router.http_server import _Protocol

    options = []
    made = _Protocol.connection_made

    def note(self: _Protocol, transport) -> None:
        made(self, transport)
        options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(_Protocol, "connection_made", note)
    async with running_router(worker) as router, httpx.AsyncClient(base_url=router.base_url) as client:
        await client.get("/health")
    assert options and all(options)


def test_a_taken_port_is_refused_by_the_name_of_its_flag() -> None:
    with listen("127.0.0.1", 0, flag="--port") as taken, pytest.raises(BadSetting, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1], flag="--port")


class AllConnected(SessionPool):
    def __init__(self) -> None:
        self.draining = set()

    def connected(self, worker_id: str):
        return self


def placer(policy: str, *workers) -> tuple[Placer, FakeCluster]:
    cluster = FakeCluster({worker.view.worker_id: worker for worker in workers}, PrefixIndex())
    return Placer(create_policy(policy, Random(0)), cluster, AllConnected()), cluster


def generation(tokens: int, salt: str = "", session: str = "") -> Generation:
    caller = Caller(tenant="", slo="interactive", session=session, timeout_s=60)
    return Generation("r", list(range(tokens)), Sampling(max_tokens=16), caller, cache_salt=salt)


def test_promised_work_counts_until_the_worker_has_reported_it() -> None:
    place, _ = placer("least-loaded", known("a", "x:1"), known("b", "x:2"))
    holds = [place.place(generation(160), [], frozenset()) for _ in range(4)]
    chosen = [hold.placement.decode.worker_id for hold in holds]
    assert sorted(chosen) == ["a", "a", "b", "b"]
    for hold in holds:
        if hold.placement.decode.worker_id == "a":
            hold.release()
    again = [place.place(generation(160), [], frozenset()) for _ in range(2)]
    assert [hold.placement.decode.worker_id for hold in again] == ["a", "a"]


def test_a_report_takes_the_place_of_older_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = placer("least-loaded", known("a", "x:1"))
    place.place(generation(160), [], frozenset())
    before = place.place(generation(16), [], frozenset()).placement.decode
    assert (before.waiting, before.queued_tokens) == (1, 160)
    now = time.monotonic()
    monkeypatch.setattr("services.router.promises.time.monotonic", lambda: now + 1)
    place.on_load("a", worker_pb2.WorkerLoad(running=2, free_blocks=7, total_blocks=9))
    after = place.place(generation(16), [], frozenset()).placement.decode
    assert (after.running, after.waiting, after.queued_tokens, after.free_blocks) == (2, 0, 0, 7)


def test_the_prefix_decides_and_a_salt_keeps_tenants_apart() -> None:
    place, cluster = placer("prefix", *(known(name, "x:1") for name in ("a", "b", "c")))
    chain = extend_chain(LAYOUT.root(""), list(range(160)), 16)
    cluster.index.apply(WorkerEvents("b", "one", 1, True, (Stored(chain),)))
    request = place.explain(generation(160))[0]
    assert dict(request.held) == {"b": 10}
    assert request.blocks == 11
    other = place.explain(generation(160, "tenant"))[0]
    assert not other.held


def test_prompts_on_their_way_count_as_held_for_their_tenant_until_they_are_computed() -> None:
    place, _ = placer("prefix", known("a", "x:1"), known("b", "x:2"))
    hold = place.place(generation(160), [], frozenset())
    where = hold.placement.computing.worker_id
    assert place.explain(generation(160))[0].expected == {where: 10}
    assert place.explain(generation(160, "tenant"))[0].expected == {}
    hold.release()
    hold.release()
    assert place.explain(generation(160))[0].expected == {}


def test_other_routers_promises_count_and_ones_own_are_told() -> None:
    place, cluster = placer("least-loaded", known("a", "x:1"), known("b", "x:2"))
    cluster.reservations.theirs["a"] = (3, 480, 30)
    hold = place.place(generation(160), [], frozenset())
    assert hold.placement.decode.worker_id == "b"
    assert cluster.reservations.mine == {"b": (1, 160, 10)}
    hold.release()
    assert cluster.reservations.mine == {"b": (0, 0, 0)}
    cluster.reservations.theirs.clear()
    cluster.reservations.theirs["b"] = (1, 1, 1)
    again = place.place(generation(160), [], frozenset()).placement.decode
    assert (again.worker_id, again.waiting) == ("a", 0)


def test_a_conversation_is_followed_to_its_worker() -> None:
    place, _ = placer("prefix", *(known(name, "x:1") for name in "abcdefgh"))
    first = place.place(generation(160, session="s"), [], frozenset()).placement.decode.worker_id
    request = place.explain(generation(160, session="s"))[0]
    assert (request.session, request.session_worker) == ("s", first)
    stranger = place.explain(generation(160, session="t"))[0]
    assert stranger.session_worker is None
    other_tenant, _ = place.explain(generation(160, "tenant", session="s"))
    assert other_tenant.session_worker is None


def test_prefill_only_and_avoided_workers_cannot_decode() -> None:
    place, _ = placer("random", known("p", "x:1", Role.PREFILL), known("d", "x:2"))
    hold = place.place(generation(160), [], frozenset())
    assert hold.placement.decode.worker_id == "d"
    with pytest.raises(Unplaceable):
        place.place(generation(160), [], frozenset({"d"}))
