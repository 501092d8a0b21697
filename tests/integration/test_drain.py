"""A worker that drains gives its streams away with their KV: same answers, nothing computed again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import counter, started_anew, until
from tests.integration.live_streams import Streamed, bodies, streams

STREAMS = 20
TOKENS = 600


@pytest.fixture(scope="module")
def pair(start_cluster: StartCluster) -> Iterator[Cluster]:
    """Behind two routers, each of which moves its own requests."""
    with start_cluster("--prefill", "2", "--decode", "2", "--routers", "2") as up:
        yield up


def replacements(cluster: Cluster) -> float:
    """Placements that the routers have given up for another."""
    return sum(counter(own_url, "baton_router_replacements_total") for own_url in cluster.own_urls)


def wait_until_used(cluster: Cluster, worker_id: str) -> None:
    """Until every router would have the worker decode."""

    def uses(own_url: str) -> bool:
        route = httpx.get(f"{own_url}/debug/route", params={"prompt": "a"}, timeout=60).json()
        decoding = {candidate["decode"]["worker"] for candidate in route["candidates"]}
        return worker_id in decoding and worker_id not in route["backed_off"]

    until(lambda: all(uses(own_url) for own_url in cluster.own_urls), f"{worker_id} is not used")


async def drained(cluster: Cluster, worker_id: str, timeout_s: float = 30.0) -> int:
    """Drain as an operator does; how many requests were left."""
    async with grpc.aio.insecure_channel(cluster.workers()[worker_id]) as channel:
        drain = worker_pb2_grpc.WorkerAdminStub(channel).Drain
        answer = await drain(worker_pb2.DrainRequest(timeout_s=timeout_s), timeout=timeout_s + 10)
    return int(answer.unfinished)


def restart(cluster: Cluster, worker_id: str, number: signal.Signals = signal.SIGTERM) -> None:
    """Stop a worker, which its supervisor starts again, and wait until it is back."""
    before = cluster.status(worker_id).incarnation
    os.kill(cluster.pids()[worker_id], number)
    wait_for_another(cluster, worker_id, before)


def wait_for_another(cluster: Cluster, worker_id: str, incarnation: str) -> None:
    until(lambda: started_anew(cluster, worker_id, incarnation), f"{worker_id} did not come back")


def test_a_drained_decode_worker_gives_its_streams_away_with_their_kv(pair: Cluster) -> None:
    asked = bodies("drain", STREAMS, TOKENS)
    undisturbed = asyncio.run(streams(pair, asked))
    left, other = pair.status("decode-0"), pair.status("decode-1")

    def state() -> tuple[float, ...]:
        return (
            counter(other.metrics_address, "baton_moves_total", outcome="moved"),
            counter(other.metrics_address, "baton_prompt_tokens_total", source="computed"),
            replacements(pair),
            pair.status("decode-1").kv_transfer_bytes,
        )

    found: dict[str, Any] = {}

    async def drain() -> None:
        found["before"] = await asyncio.to_thread(state)
        running = await asyncio.to_thread(pair.status, "decode-0")
        found["running"] = running.load.running
        found["unfinished"] = await drained(pair, "decode-0")
        found["after"] = await asyncio.to_thread(state)

    assert asyncio.run(streams(pair, asked, drain)) == undisturbed
    moved, computed, replaced, read = (
        after - before for after, before in zip(found["after"], found["before"], strict=True)
    )
    assert found["unfinished"] == 0
    assert 3 < moved <= found["running"]  # some come to a stop string meanwhile
    assert (computed, replaced) == (0, 0)
    assert read >= moved * left.layout.block_bytes
    restart(pair, "decode-0")


def test_sigterm_moves_streams_and_ends_the_worker(pair: Cluster) -> None:
    asked = bodies("sigterm", 8, TOKENS)
    undisturbed = asyncio.run(streams(pair, asked))
    before = pair.status("decode-1").incarnation
    replaced = replacements(pair)

    async def stop() -> None:
        os.kill(pair.pids()["decode-1"], signal.SIGTERM)

    assert asyncio.run(streams(pair, asked, stop)) == undisturbed
    assert replacements(pair) == replaced
    wait_for_another(pair, "decode-1", before)


def test_a_draining_prefill_worker_ends_and_nobody_notices(pair: Cluster) -> None:
    asked = bodies("prefill", 12, TOKENS)
    undisturbed = asyncio.run(streams(pair, asked))
    before = pair.status("prefill-0").incarnation
    later: list[list[Streamed]] = []

    async def stop() -> None:
        os.kill(pair.pids()["prefill-0"], signal.SIGTERM)
        later.append(await streams(pair, asked))

    assert asyncio.run(streams(pair, asked, stop)) == undisturbed
    assert later == [undisturbed]
    wait_for_another(pair, "prefill-0", before)


@pytest.mark.parametrize("victim", ["decode-0", "decode-1"], ids=["the-source", "the-target"])
def test_a_worker_killed_in_the_middle_of_moves_costs_no_token(pair: Cluster, victim: str) -> None:
    asked = bodies(f"killed {victim}", 10, TOKENS)
    undisturbed = asyncio.run(streams(pair, asked))
    before = {worker_id: pair.status(worker_id).incarnation for worker_id in ("decode-0", "decode-1")}
    pids = pair.pids()

    async def drain_and_kill() -> None:
        os.kill(pids["decode-0"], signal.SIGTERM)
        await asyncio.sleep(0.02)  # some have moved, some are moving, some are still to move
        os.kill(pids[victim], signal.SIGKILL)

    assert asyncio.run(streams(pair, asked, drain_and_kill)) == undisturbed
    for worker_id in {"decode-0", victim}:
        wait_for_another(pair, worker_id, before[worker_id])


def test_what_has_not_moved_in_time_is_replayed(start_cluster: StartCluster) -> None:
    """There is nowhere to move to until the worker is back; then its streams go on there."""
    flags = ("--prefill", "0", "--decode", "1", "--drain-timeout-s", "0.2")
    with start_cluster(*flags) as alone:
        asked = bodies("timeout", 4, TOKENS)
        undisturbed = asyncio.run(streams(alone, asked))

        async def stop() -> None:
            os.kill(alone.pids()["decode-0"], signal.SIGTERM)

        assert asyncio.run(streams(alone, asked, stop)) == undisturbed
        assert replacements(alone) > 0


async def lend(cluster: Cluster, worker_id: str, role: worker_pb2.Role.ValueType, for_s: float) -> None:
    async with grpc.aio.insecure_channel(cluster.workers()[worker_id]) as channel:
        request = worker_pb2.SetRoleRequest(role=role, for_s=for_s)
        await worker_pb2_grpc.WorkerAdminStub(channel).SetRole(request, timeout=10)


def test_a_lent_role_that_ends_under_load_costs_no_token(pair: Cluster) -> None:
    """prefill-0 helps to decode until nobody lends it that role any longer; its streams move."""
    asked = bodies("lent", 12, TOKENS)
    undisturbed = asyncio.run(streams(pair, asked))
    replaced = replacements(pair)
    asyncio.run(lend(pair, "prefill-0", worker_pb2.ROLE_DECODE, 600))
    wait_until_used(pair, "prefill-0")

    async def end() -> None:
        assert pair.status("prefill-0").load.running > 0
        await lend(pair, "prefill-0", worker_pb2.ROLE_DECODE, 0.05)
        async with asyncio.timeout(60):
            while pair.status("prefill-0").load.running:
                await asyncio.sleep(0.01)

    assert asyncio.run(streams(pair, asked, end)) == undisturbed
    assert replacements(pair) == replaced
    assert pair.status("prefill-0").role == worker_pb2.ROLE_PREFILL
    assert asyncio.run(streams(pair, asked)) == undisturbed


@pytest.mark.parametrize("for_s", [-1.0, float("nan"), float("inf"), 1e9])
def test_no_role_is_lent_for_a_time_that_is_none(pair: Cluster, for_s: float) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="for_s") as refusal:
        asyncio.run(lend(pair, "decode-0", worker_pb2.ROLE_PREFILL, for_s))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert pair.status("decode-0").role == worker_pb2.ROLE_DECODE


def test_a_role_changes_under_load_without_a_lost_token(pair: Cluster) -> None:
    """decode-0 becomes a prefill worker and back; its streams move, and it works in its new role."""
    wait_until_used(pair, "decode-0")
    asked = bodies("role", 10, TOKENS)
    undisturbed = asyncio.run(streams(pair, asked))
    replaced = replacements(pair)

    async def become(role: worker_pb2.Role.ValueType) -> None:
        await lend(pair, "decode-0", role, 0)

    async def prefill() -> None:
        assert pair.status("decode-0").load.running > 0
        await become(worker_pb2.ROLE_PREFILL)
        async with asyncio.timeout(60):
            while pair.status("decode-0").load.running:
                await asyncio.sleep(0.01)

    async def decode() -> None:
        await become(worker_pb2.ROLE_DECODE)

    assert asyncio.run(streams(pair, asked, prefill)) == undisturbed
    assert replacements(pair) == replaced
    assert asyncio.run(streams(pair, asked, decode)) == undisturbed
    assert asyncio.run(streams(pair, asked)) == undisturbed
    assert pair.status("decode-0").role == worker_pb2.ROLE_DECODE
