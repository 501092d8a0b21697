"""A handoff that fails at any step leaves no wrong token and no block behind, on either side."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from baton.rpc.v1 import worker_pb2
from tests.chaos.network import cut, reset
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import started_anew
from tests.integration.handoff_proxy import Before, Cut, HandoffProxy, Moment
from tests.integration.handoffs import (
    CHUNK,
    Asked,
    answers_rightly,
    ask,
    at_rest,
    compute_for_nobody,
    held,
    prompt_of,
    start_of,
    undisturbed,
)
from tests.waiting import until

FLAGS = ("--max-batch-tokens", str(CHUNK), "--handoff-timeout-s", "3", "--kv-blocks", "512")
# A vanished peer is found by keepalive: a ping after 10 s, 5 s for its answer.
KEEPALIVE_S = 15.0
WORKER_TTL_S = 5.0

EVERY_STEP: tuple[Moment, ...] = (
    ("begin", 1),
    ("blocks_ready", 1),
    ("blocks_ready", 3),
    ("first_token", 1),
    ("blocks_ready", 5),
    ("done", 1),
    ("released", 1),
)


@pytest.fixture(scope="module")
def fired_at(start_cluster: StartCluster) -> Iterator[Cluster]:
    """Prompts in chunks of 64 tokens."""
    with start_cluster(*FLAGS) as up:
        yield up


@pytest.fixture(scope="module")
def by_tcp(start_cluster: StartCluster) -> Iterator[Cluster]:
    """KV by TCP: the source takes part in every read, and one that is stopped keeps it under way."""
    with start_cluster(*FLAGS, "--handoff-timeout-s", "60", environ={"UCX_TLS": "tcp,self"}) as up:
        yield up


async def asked_of(cluster: Cluster, prompt: list[int], source: str) -> Asked:
    """What decode-0 makes of a prompt that prefill-0, or a stand-in at `source`, computes."""
    start = start_of(prompt, source, cluster.status("prefill-0").incarnation)
    return await ask(cluster.workers()["decode-0"], start)


async def right_tokens(cluster: Cluster, prompt: list[int]) -> list[int]:
    return await undisturbed(cluster.workers()["decode-0"], prompt)


def addresses(cluster: Cluster) -> tuple[str, str]:
    """Of decode-0 and prefill-0."""
    workers = cluster.workers()
    return workers["decode-0"], workers["prefill-0"]


def held_by(cluster: Cluster, worker_id: str) -> tuple[int, ...]:
    return held(cluster.workers()[worker_id])


async def holding_nothing(cluster: Cluster, *worker_ids: str) -> None:
    await at_rest(*(cluster.workers()[worker_id] for worker_id in worker_ids))


async def back(cluster: Cluster, worker_id: str, before: str) -> None:
    """Wait until `baton up` has started the worker anew."""
    await until(lambda: started_anew(cluster, worker_id, before), f"{worker_id} is back")


async def joined(cluster: Cluster, worker_id: str) -> None:
    """Wait until the registry, which had missed the worker, has it again."""
    await until(lambda: worker_id in cluster.workers(), f"{worker_id} has joined again")


@asynccontextmanager
async def proxy(cluster: Cluster) -> AsyncIterator[HandoffProxy]:
    async with HandoffProxy(cluster.workers()["prefill-0"]).serving() as between:
        yield between


def once(moment: Moment, act: Callable[[], None]) -> Before:
    """Do `act` when the moment comes, the first time."""
    left = [act]

    async def when(now: Moment, message: object) -> None:
        if now == moment and left:
            left.pop()()

    return when


def verifications(cluster: Cluster) -> Counter[str]:
    """Reads of decode-0 that it compared with the source, by outcome."""
    text = httpx.get(f"http://{cluster.status('decode-0').metrics_address}/metrics").text
    found = re.findall(r'^baton_kv_verifications_total\{outcome="(\w+)"\} (\S+)', text, re.MULTILINE)
    return Counter({outcome: int(float(value)) for outcome, value in found})


def cut_off() -> None:
    raise Cut


async def works_again(cluster: Cluster, prompt: list[int], expected: list[int]) -> None:
    """The same request handed over by both workers as they are now."""
    await answers_rightly(*addresses(cluster), prompt, expected)


async def test_the_stand_in_sees_every_step(fired_at: Cluster) -> None:
    expected = await right_tokens(fired_at, prompt_of(0))
    async with proxy(fired_at) as between:
        asked = await asked_of(fired_at, prompt_of(0), between.address)
        assert asked.tokens == expected
        assert set(EVERY_STEP) <= set(between.seen)
        await holding_nothing(fired_at, "prefill-0", "decode-0")


@pytest.mark.parametrize("moment", EVERY_STEP, ids=lambda moment: f"{moment[0]}-{moment[1]}")
async def test_a_connection_that_ends_at_any_step_costs_only_the_handoff(
    fired_at: Cluster, moment: Moment
) -> None:
    prompt = prompt_of(1 + EVERY_STEP.index(moment))
    expected = await right_tokens(fired_at, prompt)
    async with proxy(fired_at) as between:
        between.before = once(moment, cut_off)
        asked = await asked_of(fired_at, prompt, between.address)
        assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
        assert asked.tokens == expected[: len(asked.tokens)]
        assert len(asked.tokens) <= 1, "nothing was decoded from KV that was not released"
        await holding_nothing(fired_at, "prefill-0", "decode-0")
        await works_again(fired_at, prompt, expected)


@pytest.mark.parametrize(
    "moment", [("blocks_ready", 2), ("released", 1)], ids=["between chunks", "at the end"]
)
async def test_a_prefill_worker_killed_in_a_handoff_costs_only_that(
    fired_at: Cluster, moment: Moment
) -> None:
    prompt = prompt_of(20 + moment[1])
    expected = await right_tokens(fired_at, prompt)
    before = fired_at.status("prefill-0").incarnation
    async with proxy(fired_at) as between:
        pid = fired_at.pids()["prefill-0"]
        between.before = once(moment, lambda: os.kill(pid, signal.SIGKILL))
        asked = await asked_of(fired_at, prompt, between.address)
        # What was released before the death may be decoded from: then the answer is whole.
        assert asked.finished == (moment[0] == "released")
        assert asked.tokens == expected[: len(asked.tokens)]
        await holding_nothing(fired_at, "decode-0")
    await back(fired_at, "prefill-0", before)
    await works_again(fired_at, prompt, expected)


async def test_a_prefill_worker_killed_while_it_is_read_costs_only_the_handoff(by_tcp: Cluster) -> None:
    prompt = prompt_of(30)
    expected = await right_tokens(by_tcp, prompt)
    before = by_tcp.status("prefill-0").incarnation
    pid = by_tcp.pids()["prefill-0"]

    async def reading() -> None:
        await until(lambda: held_by(by_tcp, "decode-0")[0] > 0, "decode-0 has blocks to read into")
        os.kill(pid, signal.SIGKILL)

    async with proxy(by_tcp) as between, asyncio.TaskGroup() as tasks:

        def stop() -> None:
            os.kill(pid, signal.SIGSTOP)
            tasks.create_task(reading())

        between.before = once(("blocks_ready", 1), stop)
        asked = await asked_of(by_tcp, prompt, between.address)
    assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
    assert asked.tokens == expected[: len(asked.tokens)]
    await holding_nothing(by_tcp, "decode-0")
    await back(by_tcp, "prefill-0", before)
    await works_again(by_tcp, prompt, expected)


async def test_a_handoff_that_ends_while_the_last_blocks_are_read_ends_the_read(by_tcp: Cluster) -> None:
    """A read from a worker that does not answer would go on for `--handoff-timeout-s`."""
    prompt = prompt_of(31)
    expected = await right_tokens(by_tcp, prompt)
    before, pid = by_tcp.status("prefill-0").incarnation, by_tcp.pids()["prefill-0"]
    async with proxy(by_tcp) as between:
        between.before = once(("blocks_ready", 5), lambda: os.kill(pid, signal.SIGSTOP))
        between.last = ("blocks_ready", 5)
        try:
            asked = await asked_of(by_tcp, prompt, between.address)
            await holding_nothing(by_tcp, "decode-0")
        finally:
            os.kill(pid, signal.SIGKILL)
    assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
    assert asked.tokens == expected[: len(asked.tokens)]
    await back(by_tcp, "prefill-0", before)
    await works_again(by_tcp, prompt, expected)


async def test_connections_that_broke_while_nobody_used_them_cost_no_handoff(by_tcp: Cluster) -> None:
    reset(by_tcp.pids()["decode-0"], only_ipv4=True)
    prompt = prompt_of(32)
    expected = await right_tokens(by_tcp, prompt)
    assert await answers_rightly(*addresses(by_tcp), prompt, expected) > 0


@pytest.mark.parametrize(
    "moment", [("blocks_ready", 2), ("done", 1)], ids=["between chunks", "after reading"]
)
async def test_a_decode_worker_killed_in_a_handoff_leaves_no_lease(fired_at: Cluster, moment: Moment) -> None:
    prompt = prompt_of(40 + moment[1])
    expected = await right_tokens(fired_at, prompt)
    before = fired_at.status("decode-0").incarnation
    async with proxy(fired_at) as between:
        pid = fired_at.pids()["decode-0"]
        between.before = once(moment, lambda: os.kill(pid, signal.SIGKILL))
        asked = await asked_of(fired_at, prompt, between.address)
        assert asked.lost
        assert asked.tokens == expected[: len(asked.tokens)]
        await holding_nothing(fired_at, "prefill-0")
    await back(fired_at, "decode-0", before)
    await works_again(fired_at, prompt, expected)


@pytest.mark.parametrize(
    "moment", [("blocks_ready", 1), ("blocks_ready", 3)], ids=["at first", "between chunks"]
)
async def test_a_stalled_prefill_worker_is_given_up_and_may_come_back(
    fired_at: Cluster, moment: Moment
) -> None:
    """Others go on meanwhile; awake again it finds its lease gone."""
    prompt, other = prompt_of(50 + moment[1]), prompt_of(60 + moment[1])
    expected, others = await right_tokens(fired_at, prompt), await right_tokens(fired_at, other)
    pid = fired_at.pids()["prefill-0"]
    async with proxy(fired_at) as between:
        between.before = once(moment, lambda: os.kill(pid, signal.SIGSTOP))
        try:
            asked = await asked_of(fired_at, prompt, between.address)
            assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
            assert (await ask(fired_at.workers()["decode-0"], start_of(other))).tokens == others
            await holding_nothing(fired_at, "decode-0")
        finally:
            os.kill(pid, signal.SIGCONT)
        await holding_nothing(fired_at, "prefill-0")
    await works_again(fired_at, prompt, expected)


async def test_a_stalled_decode_worker_finds_its_lease_gone_and_may_come_back(fired_at: Cluster) -> None:
    """Others have had its blocks meanwhile."""
    prompt = prompt_of(70) * 10  # long enough to be in the middle of
    expected = await right_tokens(fired_at, prompt)
    decode, prefill = addresses(fired_at)
    pid = fired_at.pids()["decode-0"]
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(asked_of(fired_at, prompt, prefill))
        await until(lambda: all(held(prefill)[:3]), "prefill-0 has announced blocks")
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(lambda: not any(held(prefill)), "prefill-0 gives the lease up")
            for number in (71, 72, 73):  # more than its pool holds
                await compute_for_nobody(prefill, prompt_of(number) * 10)
        finally:
            os.kill(pid, signal.SIGCONT)
    asked = asking.result()
    assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
    assert asked.tokens == expected[: len(asked.tokens)]
    await at_rest(decode, prefill)
    assert await answers_rightly(decode, prefill, prompt, expected) > 0
    await joined(fired_at, "decode-0")


@pytest.mark.parametrize("network", ["fired_at", "by_tcp"], ids=["any", "tcp"])
async def test_a_decode_worker_cut_off_loses_its_lease_within_the_keepalive_bound(
    network: str, request: pytest.FixtureRequest
) -> None:
    """And uses nothing of what it had read when its network is back; then it reads KV as before."""
    cluster: Cluster = request.getfixturevalue(network)
    prompt = prompt_of(80) * 10
    expected = await right_tokens(cluster, prompt)
    decode, prefill = addresses(cluster)
    pids = cluster.pids()
    others = [pid for name, pid in pids.items() if name != "decode-0"]
    async with asyncio.TaskGroup() as tasks:
        # Straight from one worker to the other: a stand-in would be on neither side of the cut.
        asking = tasks.create_task(asked_of(cluster, prompt, prefill))
        await until(lambda: all(held(prefill)[:3]), "prefill-0 has announced blocks")
        for_long = cut(pids["decode-0"], KEEPALIVE_S + 3.0, lambda: others, deaf=True, mute=True)
        tasks.create_task(for_long)
        await until(lambda: not any(held(prefill)), "prefill-0 gives the lease up")
    assert asking.result().tokens == expected[: len(asking.result().tokens)]
    await at_rest(decode, prefill)

    async def hands_over() -> bool:
        again = await asked_of(cluster, prompt, prefill)
        assert again.tokens == expected[: len(again.tokens)]
        return again.finished

    await joined(cluster, "decode-0")
    # A connection made during the cut may take a moment to be found dead.
    await until(hands_over, "the two hand over again")
    await at_rest(decode, prefill)
    # The KV that the two have now says nothing of what the cut did to connections that nobody used.
    for number in (81, 82):
        another = prompt_of(number)
        expected = await right_tokens(cluster, another)
        assert await answers_rightly(decode, prefill, another, expected) > 0


async def test_a_kvstore_cut_off_for_longer_than_workers_may_be_silent_costs_no_request(
    fired_at: Cluster,
) -> None:
    """It thinks that all workers have gone, and says so when its network is back; they join again at once."""
    pids = fired_at.pids()
    others = [pid for name, pid in pids.items() if name != "kvstore"]
    cutting = asyncio.create_task(
        cut(pids["kvstore"], WORKER_TTL_S + 3.0, lambda: others, deaf=True, mute=True)
    )
    body = {"prompt": prompt_of(90)[:50], "max_tokens": 2, "temperature": 0}
    answered: list[int] = []
    async with httpx.AsyncClient(base_url=fired_at.base_url, timeout=60) as client:

        async def keep_asking() -> None:
            while not (cutting.done() and joined_again(fired_at)):
                answered.append((await client.post("/v1/completions", json=body)).status_code)

        async with asyncio.timeout(60):
            await keep_asking()
    await cutting
    assert set(answered) == {200}


def joined_again(cluster: Cluster) -> bool:
    """Whether the kvstore knows both workers after it had given them up."""
    said = cluster.logs()["kvstore"].rpartition("is gone")[2]
    return all(f"worker {worker_id} joined" in said for worker_id in ("prefill-0", "decode-0"))
