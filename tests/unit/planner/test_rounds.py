"""Does the planner see what routers and workers say, and do what it decides, to the right ones?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from baton.config import PlannerSettings
from baton.planning.demand import Arrived, Ended
from baton.routing import Curve, Role, WorkerView
from baton.rpc.kvstore_messages import ROLE_NUMBERS, ROLES
from baton.rpc.registry_watch import Peer
from baton.rpc.v1 import kvstore_pb2, worker_pb2, worker_pb2_grpc
from services.planner.demand import Routers, Tally, read_page
from services.planner.leader import Alone
from services.planner.metrics import Metrics
from services.planner.planner import Planner, Reach
from services.planner.workloads import Deployments
from tests.unit.planner.api_server import SPACE, ApiServer
from tests.waiting import until

PAGE = """\
# TYPE baton_router_arrived_choices_total counter
baton_router_arrived_choices_total {arrived}
# TYPE baton_router_arrived_prompt_tokens_total counter
baton_router_arrived_prompt_tokens_total {tokens}
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{model_name="m"}} 3
# TYPE vllm:request_generation_tokens histogram
vllm:request_generation_tokens_bucket{{model_name="m",le="+Inf"}} {ended}
vllm:request_generation_tokens_sum{{model_name="m"}} {outputs}
vllm:request_generation_tokens_count{{model_name="m"}} {ended}
"""


def page(arrived: int, tokens: int = 0, ended: int = 0, outputs: int = 0) -> dict[str, float]:
    return dict(read_page(PAGE.format(arrived=arrived, tokens=tokens, ended=ended, outputs=outputs)))


class TestTally:
    def test_counters_become_what_happened_in_between(self) -> None:
        tally = Tally()
        assert tally.take({"a": page(100, 5000)}).arrived == Arrived()
        found = tally.take({"a": page(130, 8000, outputs=500)})
        assert found.arrived == Arrived(30, 3000)
        assert found.ended == Ended(output_tokens=500)
        assert found.waiting == 3
        assert not found.prefills_beside
        assert tally.take({"a": page(130), "b": {"baton_router_prefills_beside": 1.0}}).prefills_beside

    def test_routers_add_up_and_one_that_is_new_or_back_counts_from_its_start(self) -> None:
        tally = Tally()
        tally.take({"a": page(100), "b": page(50)})
        assert tally.take({"a": page(110), "b": page(7), "c": page(1000)}).arrived.requests == 10 + 7
        assert tally.take({"a": page(120), "b": page(7), "c": page(1001)}).arrived.requests == 11

    def test_a_round_without_answers_loses_nothing(self) -> None:
        tally = Tally()
        tally.take({"a": page(100)})
        assert tally.take({}).routers == 0
        assert tally.take({"a": page(150)}).arrived.requests == 50


async def test_a_page_that_comes_in_pieces_is_read_to_its_end() -> None:
    text = PAGE.format(arrived=130, tokens=8000, ended=20, outputs=500).encode()
    pieces: list[bytes] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.02)
        return response

    async with metrics_page(answer) as address, aiohttp.ClientSession() as session:
        routers = Routers(address, session)
        pieces[:] = [PAGE.format(arrived=100, tokens=5000, ended=10, outputs=0).encode()]
        assert (await routers.look()).routers == 1
        for cut in range(1, len(text), 40):
            pieces[:] = [text[:cut], text[cut:]]
            await routers.look()
        pieces[:] = [PAGE.format(arrived=131, tokens=8100, ended=20, outputs=500).encode()]
        assert (await routers.look()).arrived == Arrived(1, 100)
        pieces[:] = [b"#" * 1_000_000] * 5
        assert (await routers.look()).routers == 0


@dataclass
class Worker(worker_pb2_grpc.WorkerAdminServicer):
    """A worker as far as the planner goes: it can be given another role."""

    name: str
    role: Role
    address: str = ""
    told: list[int] = field(default_factory=list)
    lent_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own_role = self.role

    async def SetRole(self, request: Any, context: Any) -> worker_pb2.SetRoleResponse:
        if ROLES[request.role] is not self.role:
            self.told.append(request.role)
        self.lent_s.append(request.for_s)
        self.role = ROLES[request.role]
        return worker_pb2.SetRoleResponse()

    def peer(self) -> Peer:
        view = WorkerView(
            *(self.name, "1", self.address, self.role),
            total_blocks=1000,
            free_blocks=1000,
            prefill_curve=Curve(((1000, 0.2),)),
            decode_curve=Curve(((1, 0.09), (32, 0.1))),  # which leaves next to no time for prompts
        )
        layout = worker_pb2.KvLayout(block_size=16)
        worker = kvstore_pb2.Worker(
            worker_id=self.name,
            layout=layout,
            role=ROLE_NUMBERS[self.role],
            own_role=ROLE_NUMBERS[self.own_role],
        )
        return Peer(worker, worker_pb2.WorkerLoad(), view)


class Registry:
    """What `RegistryWatch` shows of `workers`."""

    connected = True

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = workers

    @property
    def peers(self) -> dict[str, Peer]:
        return {worker.name: worker.peer() for worker in self._workers}

    def views(self) -> list[WorkerView]:
        return [peer.view for peer in self.peers.values()]

    async def ready(self) -> None:
        return None


class Standby(Alone):
    leading = False


@asynccontextmanager
async def router(per_look: int, prompt_tokens: int) -> AsyncIterator[str]:
    """A router's metrics: so many more arrived each time that somebody looks."""
    looks = 0

    async def answer(_: web.Request) -> web.Response:
        nonlocal looks
        looks += 1
        arrived = looks * per_look
        return web.Response(
            text=PAGE.format(arrived=arrived, tokens=arrived * prompt_tokens, ended=0, outputs=0)
        )

    async with metrics_page(answer) as address:
        yield address


@asynccontextmanager
async def metrics_page(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[str]:
    """Serve /metrics; its host:port."""
    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def planning(
    roles: str, server: ApiServer, per_look: int, *, leads: bool = True, **settings: Any
) -> AsyncIterator[list[Worker]]:
    """A planner at work on workers of `roles` ("ppd": two prefill, one decode) on a cluster that asks
    `per_look` prompts of 1000 tokens each round of 50 ms."""
    names = {Role.PREFILL: "llm-prefill", Role.DECODE: "llm-decode"}
    workers = [
        Worker(f"{names[role]}-f00-{number:05}", role)
        for number, letter in enumerate(roles)
        for role in [Role.PREFILL if letter == "p" else Role.DECODE]
    ]
    async with AsyncExitStack() as stack:
        for worker in workers:
            admin = grpc.aio.server()
            worker_pb2_grpc.add_WorkerAdminServicer_to_server(worker, admin)
            worker.address = f"127.0.0.1:{admin.add_insecure_port('127.0.0.1:0')}"
            await admin.start()
            stack.push_async_callback(admin.stop, None)
        address = await stack.enter_async_context(router(per_look, 1000))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        client = await stack.enter_async_context(server.client())
        reach = Reach(
            Registry(workers),  # type: ignore[arg-type]
            Routers(address, session),
            Deployments(client, SPACE, names, "me"),
            Alone() if leads else Standby(),
        )
        chosen = PlannerSettings(plan_interval_s=0.05, grow_after_s=0.2, **settings)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        running = tasks.create_task(Planner(chosen, reach, Metrics()).run())
        try:
            yield workers
        finally:
            running.cancel()


async def test_a_burst_of_prompts_makes_a_decode_worker_prefill_and_an_event_says_why() -> None:
    server = ApiServer(llm_prefill=1, llm_decode=3)
    async with planning("pddd", server, 5, budget_gpus=4) as workers:
        await until(lambda: server.events)
        assert workers[0].told == []
        assert any(worker.told == [worker_pb2.ROLE_PREFILL] for worker in workers[1:])
    assert server.events[0]["reason"] == "RoleFlipped"
    assert "prefill" in server.events[0]["message"]
    assert server.replicas == {"llm-prefill": 1, "llm-decode": 3}


async def test_a_lent_role_is_lent_on_by_whoever_leads_and_one_given_for_good_is_left_alone() -> None:
    server = ApiServer(llm_prefill=1, llm_decode=3)
    async with planning("pddd", server, 0, budget_gpus=4, least_prefill=2) as workers:
        before, lent, given = workers[0], workers[1], workers[2]
        lent.role = given.role = given.own_role = Role.PREFILL
        await until(lambda: len(lent.lent_s) > 3)
        lent.own_role = Role.PREFILL  # an operator has said so
        lent.lent_s.clear()
        rounds = len(server.log)
        await until(lambda: len(server.log) > rounds + 20)
        assert len(lent.lent_s) <= 1  # which was on its way
        assert not before.lent_s
        assert not given.lent_s


@pytest.mark.parametrize("how", [{"leads": False}, {"dry_run": True}])
async def test_a_planner_that_does_not_act_lends_no_role_on(how: dict[str, bool]) -> None:
    server = ApiServer(llm_prefill=1, llm_decode=3)
    async with planning("pddd", server, 0, **how) as workers:
        workers[1].role = Role.PREFILL
        await until(lambda: len(server.log) > 30)
        assert not any(worker.lent_s for worker in workers)


async def test_roles_are_lent_on_while_neither_routers_nor_the_api_server_answer() -> None:
    server = ApiServer(llm_prefill=1, llm_decode=2)
    server.refuse = 500
    async with planning("pdd", server, 0) as workers:
        workers[1].role = Role.PREFILL
        await until(lambda: len(workers[1].lent_s) > 3)
        # For longer than a planner's start takes, so that no role ends with the planner that gave it.
        assert min(workers[1].lent_s) == 30
        workers[0].role = Role.DECODE
        await until(lambda: workers[0].lent_s)
        # Whoever decodes stays until those that come back to decoding are there.
        assert workers[0].lent_s[0] > max(workers[1].lent_s) + 5


async def test_no_deployment_shrinks_to_where_nobody_is_left_whose_own_role_it_is() -> None:
    server = ApiServer(llm_prefill=3, llm_decode=1)
    async with planning("pppd", server, 0, budget_gpus=4, shrink_after_s=0.1) as workers:
        workers[0].role = Role.DECODE
        await until(lambda: server.replicas["llm-prefill"] == 2)
        rounds = len(server.log)
        await until(lambda: len(server.log) > rounds + 20)
        assert server.replicas["llm-decode"] == 1


async def test_what_flips_cannot_mend_raises_replicas_to_the_budget_and_not_beyond() -> None:
    server = ApiServer(llm_prefill=1, llm_decode=1)
    async with planning("pd", server, 50, budget_gpus=4):
        await until(lambda: any(event["reason"] == "WorkersAdded" for event in server.events))
        rounds = len(server.log)
        await until(lambda: len(server.log) > rounds + 20)
    assert server.replicas == {"llm-prefill": 3, "llm-decode": 1}


async def test_a_dry_run_says_once_what_it_would_do_and_does_nothing() -> None:
    server = ApiServer(llm_prefill=1, llm_decode=3)
    async with planning("pddd", server, 5, budget_gpus=4, dry_run=True) as workers:
        await until(lambda: server.events)
        rounds = len(server.log)
        await until(lambda: len(server.log) > rounds + 20)
        assert not any(worker.told for worker in workers)
    assert [event["message"][:10] for event in server.events] == ["would flip"]
    assert not [one for one in server.log if one[0] == "PATCH"]


async def test_a_planner_that_does_not_lead_does_nothing() -> None:
    server = ApiServer(llm_prefill=1, llm_decode=3)
    async with planning("pddd", server, 50, leads=False, budget_gpus=8) as workers:
        await until(lambda: len(server.log) > 30)
        assert not any(worker.told for worker in workers)
    assert not server.events
    assert {method for method, _ in server.log} == {"GET"}


@pytest.mark.parametrize("status", [403, 500])
async def test_an_api_server_that_refuses_is_asked_again(status: int) -> None:
    server = ApiServer(llm_prefill=1, llm_decode=3)
    server.refuse = status
    async with planning("pddd", server, 5, budget_gpus=4) as workers:
        await until(lambda: len(server.log) > 6)
        assert not any(worker.told for worker in workers)
        server.refuse = 0
        await until(lambda: server.events)
        assert any(worker.told for worker in workers)
