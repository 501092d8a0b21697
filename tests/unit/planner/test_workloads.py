"""Do scale, Events and the Lease go over the wire as Kubernetes takes them?"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from kubernetes.aio.client import ApiException

from baton.routing import Role
from services.planner import leader
from services.planner.leader import LeaseLeadership
from services.planner.planner import devices, owner, starting
from services.planner.workloads import Deployments, Workload
from tests.unit.planner.api_server import SPACE, ApiServer
from tests.waiting import until

NAMES = {Role.PREFILL: "llm-prefill", Role.DECODE: "llm-decode"}
BOTH = {Role.PREFILL: Workload("llm-prefill", 3), Role.DECODE: Workload("llm-decode", 1)}
PODS = ["llm-prefill-6f7d-abcde", "llm-prefill-6f7d-fghij", "llm-decode-77c9-klmno", "llm-decode-77c9-pqrst"]


async def test_replicas_are_read_and_changed_by_the_scale_of_the_deployments() -> None:
    server = ApiServer(llm_prefill=2, llm_decode=0)
    async with server.client() as client:
        deployments = Deployments(client, SPACE, NAMES, "me")
        found = await deployments.read()
        assert found == {Role.PREFILL: Workload("llm-prefill", 2), Role.DECODE: Workload("llm-decode", 0)}
        await deployments.scale(found[Role.PREFILL], 3)
    assert server.replicas == {"llm-prefill": 3, "llm-decode": 0}
    assert all(path.endswith("/scale") for _, path in server.log)


async def test_a_decision_is_an_event_of_the_deployment() -> None:
    server = ApiServer(llm_prefill=2)
    async with server.client() as client:
        await Deployments(client, SPACE, NAMES, "me").tell(BOTH[Role.PREFILL], "WorkersAdded", "x" * 5000)
    (event,) = server.events
    assert event["involvedObject"]["kind"] == "Deployment"
    assert event["involvedObject"]["name"] == "llm-prefill"
    assert event["reason"] == "WorkersAdded"
    assert len(event["message"]) == 1024


async def test_a_refusal_is_an_error_and_no_silence() -> None:
    server = ApiServer(llm_prefill=2, llm_decode=1)
    server.refuse = 403
    async with server.client() as client:
        with pytest.raises(ApiException):
            await Deployments(client, SPACE, NAMES, "me").read()


def test_pods_belong_to_the_deployment_they_are_named_for() -> None:
    assert owner(BOTH, PODS[0]) == BOTH[Role.PREFILL]
    assert owner(BOTH, "other-prefill-6f7d-abcde") is None
    assert owner({Role.PREFILL: Workload("llm", 1)}, PODS[0]) is None


def test_workers_that_start_and_workers_that_go_take_devices() -> None:
    assert starting(BOTH, PODS) == {Role.PREFILL: 1, Role.DECODE: 0}
    gpus = {Role.PREFILL: 2, Role.DECODE: 1}
    assert devices(BOTH, PODS, gpus) == 3 * 2 + 2 * 1
    assert devices({}, PODS, gpus) == 4


async def test_one_of_two_leads_and_the_other_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "_LEASE_S", 3)
    monkeypatch.setattr(leader, "_HELD_S", 2.0)
    monkeypatch.setattr(leader, "_RETRY_S", 0.2)
    server = ApiServer()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.client()) for _ in range(2)]
        both = [LeaseLeadership(client, SPACE, "plan", f"p{n}") for n, client in enumerate(clients)]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one.run()) for one in both]
            await until(lambda: both[0].leading or both[1].leading)
            first = 0 if both[0].leading else 1
            assert not both[1 - first].leading
            assert server.leases["plan"]["spec"]["holderIdentity"] == f"p{first}"
            running[first].cancel()
            await until(lambda: both[1 - first].leading)
            assert not both[first].leading
            running[1 - first].cancel()


async def test_a_leader_cut_off_from_the_api_server_stops_leading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "_LEASE_S", 3)
    monkeypatch.setattr(leader, "_HELD_S", 2.0)
    monkeypatch.setattr(leader, "_RETRY_S", 0.2)
    server = ApiServer()
    async with server.client() as client, asyncio.TaskGroup() as tasks:
        one = LeaseLeadership(client, SPACE, "plan", "p0")
        running = tasks.create_task(one.run())
        await until(lambda: one.leading)
        server.refuse = 500
        await until(lambda: not one.leading)
        server.refuse = 0
        await until(lambda: one.leading)
        running.cancel()
