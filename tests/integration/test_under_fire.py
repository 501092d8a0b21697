"""A handoff that fails at any step leaves no wrong token and no block behind, on either side."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import grpc
import httpx
import pytest

from baton.rpc.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from tests.chaos.network import cut
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.handoff_proxy import Before, Cut, HandoffProxy, Moment
from tests.integration.kvstore_processes import until

TOKENS = 12
CHUNK = 64
FLAGS = ("--max-batch-tokens", str(CHUNK), "--handoff-timeout-s", "3")
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


@pytest.fixture
def fresh(start_cluster: StartCluster) -> Iterator[Cluster]:
    """The same, for one test: after its network was cut, a worker's KV may not be readable any more."""
    with start_cluster(*FLAGS) as up:
        yield up


@pytest.fixture
def by_tcp(start_cluster: StartCluster) -> Iterator[Cluster]:
    """KV by TCP: the source takes part in every read, and one that is stopped keeps it under way."""
    with start_cluster(*FLAGS, environ={"UCX_TLS": "tcp,self"}) as up:
        yield up


class Asked:
    """What a worker answered one request with; `error` is the kind of it, 0 for none."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.error = 0
        self.finished = False
        self.lost = False


def prompt_of(number: int) -> list[int]:
    draw = random.Random(number)
    return [draw.randrange(100, 4000) for _ in range(5 * CHUNK - 3)]


def start_of(cluster: Cluster, prompt: list[int], address: str) -> worker_pb2.Start:
    return worker_pb2.Start(
        key=1,
        request_id="fired at",
        prompt_token_ids=prompt,
        sampling=worker_pb2.Sampling(
            max_tokens=TOKENS, temperature=0.8, seed=3, top_p=1, repetition_penalty=1, ignore_eos=True
        ),
        prefill_address=address,
        prefill_incarnation=cluster.status("prefill-0").incarnation if address else "",
    )


async def ask(cluster: Cluster, start: worker_pb2.Start) -> Asked:
    """Send a request to decode-0 as a router would, and take what comes."""
    asked = Asked()
    async with grpc.aio.insecure_channel(cluster.workers()["decode-0"]) as channel:
        call = worker_pb2_grpc.DecodeStub(channel).Session(timeout=60)
        await call.write(worker_pb2.SessionRequest(hello=worker_pb2.Hello(router_id="test"), starts=[start]))
        try:
            async for step in call:
                for output in step.outputs:
                    asked.tokens += output.token_ids
                    asked.error = output.error.kind
                    asked.finished = output.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED
                    if asked.finished or asked.error:
                        return asked
        except grpc.aio.AioRpcError:
            asked.lost = True
    return asked


async def undisturbed(cluster: Cluster, prompt: list[int]) -> list[int]:
    """The right tokens, from KV that decode-0 computes itself and that nobody else ever sees."""
    start = start_of(cluster, prompt, "")
    start.cache_salt = "undisturbed"
    asked = await ask(cluster, start)
    assert asked.finished
    return asked.tokens


def held(cluster: Cluster, worker_id: str) -> tuple[int, ...]:
    status = cluster.status(worker_id)
    used = status.load.total_blocks - status.load.free_blocks
    return (status.pinned_blocks, used, status.handoffs_serving, status.handoffs_reading)


async def at_rest(cluster: Cluster, *worker_ids: str) -> None:
    """Wait until the workers hold nothing for anybody."""
    await until(
        lambda: not any(any(held(cluster, worker_id)) for worker_id in worker_ids),
        f"{worker_ids} hold nothing any more",
    )


async def back(cluster: Cluster, worker_id: str, before: str) -> None:
    """Wait until `baton up` has started the worker anew."""

    def anew() -> bool:
        with suppress(KeyError, grpc.RpcError):
            return cluster.status(worker_id).incarnation != before
        return False

    await until(anew, f"{worker_id} is back")


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


async def answers_rightly(cluster: Cluster, prompt: list[int], expected: list[int]) -> None:
    """The same request handed over by both workers as they are now."""
    asked = await ask(cluster, start_of(cluster, prompt, cluster.workers()["prefill-0"]))
    assert asked.finished
    assert asked.tokens == expected
    await at_rest(cluster, "prefill-0", "decode-0")


async def test_the_stand_in_sees_every_step(fired_at: Cluster) -> None:
    expected = await undisturbed(fired_at, prompt_of(0))
    async with proxy(fired_at) as between:
        asked = await ask(fired_at, start_of(fired_at, prompt_of(0), between.address))
        assert asked.tokens == expected
        assert set(EVERY_STEP) <= set(between.seen)
        await at_rest(fired_at, "prefill-0", "decode-0")


@pytest.mark.parametrize("moment", EVERY_STEP, ids=lambda moment: f"{moment[0]}-{moment[1]}")
async def test_a_connection_that_ends_at_any_step_costs_only_the_handoff(
    fired_at: Cluster, moment: Moment
) -> None:
    prompt = prompt_of(1 + EVERY_STEP.index(moment))
    expected = await undisturbed(fired_at, prompt)
    async with proxy(fired_at) as between:
        between.before = once(moment, cut_off)
        asked = await ask(fired_at, start_of(fired_at, prompt, between.address))
        assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
        assert asked.tokens == expected[: len(asked.tokens)]
        assert len(asked.tokens) <= 1, "nothing was decoded from KV that was not released"
        await at_rest(fired_at, "prefill-0", "decode-0")
        await answers_rightly(fired_at, prompt, expected)


@pytest.mark.parametrize(
    "moment", [("blocks_ready", 2), ("released", 1)], ids=["between chunks", "at the end"]
)
async def test_a_prefill_worker_killed_in_a_handoff_costs_only_that(
    fired_at: Cluster, moment: Moment
) -> None:
    prompt = prompt_of(20 + moment[1])
    expected = await undisturbed(fired_at, prompt)
    before = fired_at.status("prefill-0").incarnation
    async with proxy(fired_at) as between:
        pid = fired_at.pids()["prefill-0"]
        between.before = once(moment, lambda: os.kill(pid, signal.SIGKILL))
        asked = await ask(fired_at, start_of(fired_at, prompt, between.address))
        # What was released before the death may be decoded from: then the answer is whole.
        assert asked.finished == (moment[0] == "released")
        assert asked.tokens == expected[: len(asked.tokens)]
        await at_rest(fired_at, "decode-0")
    await back(fired_at, "prefill-0", before)
    await answers_rightly(fired_at, prompt, expected)


async def test_a_prefill_worker_killed_while_it_is_read_costs_only_the_handoff(by_tcp: Cluster) -> None:
    prompt = prompt_of(30)
    expected = await undisturbed(by_tcp, prompt)
    before = by_tcp.status("prefill-0").incarnation
    pid = by_tcp.pids()["prefill-0"]

    async def reading() -> None:
        await until(lambda: held(by_tcp, "decode-0")[0] > 0, "decode-0 has blocks to read into")
        os.kill(pid, signal.SIGKILL)

    async with proxy(by_tcp) as between, asyncio.TaskGroup() as tasks:

        def stop() -> None:
            os.kill(pid, signal.SIGSTOP)
            tasks.create_task(reading())

        between.before = once(("blocks_ready", 1), stop)
        asked = await ask(by_tcp, start_of(by_tcp, prompt, between.address))
    assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
    assert asked.tokens == expected[: len(asked.tokens)]
    await at_rest(by_tcp, "decode-0")
    await back(by_tcp, "prefill-0", before)
    await answers_rightly(by_tcp, prompt, expected)


@pytest.mark.parametrize(
    "moment", [("blocks_ready", 2), ("done", 1)], ids=["between chunks", "after reading"]
)
async def test_a_decode_worker_killed_in_a_handoff_leaves_no_lease(fired_at: Cluster, moment: Moment) -> None:
    prompt = prompt_of(40 + moment[1])
    expected = await undisturbed(fired_at, prompt)
    before = fired_at.status("decode-0").incarnation
    async with proxy(fired_at) as between:
        pid = fired_at.pids()["decode-0"]
        between.before = once(moment, lambda: os.kill(pid, signal.SIGKILL))
        asked = await ask(fired_at, start_of(fired_at, prompt, between.address))
        assert asked.lost
        assert asked.tokens == expected[: len(asked.tokens)]
        await at_rest(fired_at, "prefill-0")
    await back(fired_at, "decode-0", before)
    await answers_rightly(fired_at, prompt, expected)


@pytest.mark.parametrize(
    "moment", [("blocks_ready", 1), ("blocks_ready", 3)], ids=["at first", "between chunks"]
)
async def test_a_stalled_prefill_worker_is_given_up_and_may_come_back(
    fired_at: Cluster, moment: Moment
) -> None:
    """Others go on meanwhile; awake again it finds its lease gone."""
    prompt, other = prompt_of(50 + moment[1]), prompt_of(60 + moment[1])
    expected, others = await undisturbed(fired_at, prompt), await undisturbed(fired_at, other)
    pid = fired_at.pids()["prefill-0"]
    async with proxy(fired_at) as between:
        between.before = once(moment, lambda: os.kill(pid, signal.SIGSTOP))
        try:
            asked = await ask(fired_at, start_of(fired_at, prompt, between.address))
            assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
            assert (await ask(fired_at, start_of(fired_at, other, ""))).tokens == others
            await at_rest(fired_at, "decode-0")
        finally:
            os.kill(pid, signal.SIGCONT)
        await at_rest(fired_at, "prefill-0")
    await answers_rightly(fired_at, prompt, expected)


async def test_a_decode_worker_cut_off_loses_its_lease_within_the_keepalive_bound(fired_at: Cluster) -> None:
    """And uses nothing of what it had read when its network is back."""
    prompt = prompt_of(70) * 10  # long enough to be in the middle of
    expected = await undisturbed(fired_at, prompt)
    pids = fired_at.pids()
    others = [pid for name, pid in pids.items() if name != "decode-0"]
    # Straight from one worker to the other: a stand-in would be on neither side of the cut.
    start = start_of(fired_at, prompt, fired_at.workers()["prefill-0"])
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(ask(fired_at, start))
        await until(lambda: all(held(fired_at, "prefill-0")[:3]), "prefill-0 has announced blocks")
        for_long = cut(pids["decode-0"], KEEPALIVE_S + 3.0, lambda: others, deaf=True, mute=True)
        tasks.create_task(for_long)
        await until(lambda: not any(held(fired_at, "prefill-0")), "prefill-0 gives the lease up")
    assert asking.result().tokens == expected[: len(asking.result().tokens)]
    await at_rest(fired_at, "prefill-0", "decode-0")
    await answers_rightly(fired_at, prompt, expected)


async def test_a_kvstore_cut_off_for_longer_than_workers_may_be_silent_costs_no_request(
    fresh: Cluster,
) -> None:
    """It thinks that all workers have gone, and says so when its network is back; they join again at once."""
    pids = fresh.pids()
    others = [pid for name, pid in pids.items() if name != "kvstore"]
    cutting = asyncio.create_task(
        cut(pids["kvstore"], WORKER_TTL_S + 3.0, lambda: others, deaf=True, mute=True)
    )
    body = {"prompt": prompt_of(80)[:50], "max_tokens": 2, "temperature": 0}
    answered: list[int] = []
    async with httpx.AsyncClient(base_url=fresh.base_url, timeout=60) as client:

        async def keep_asking() -> None:
            while not (cutting.done() and joined_again(fresh)):
                answered.append((await client.post("/v1/completions", json=body)).status_code)

        async with asyncio.timeout(60):
            await keep_asking()
    await cutting
    assert set(answered) == {200}


def joined_again(cluster: Cluster) -> bool:
    """Whether the kvstore knows both workers after it had given them up."""
    said = cluster.logs()["kvstore"].rpartition("is gone")[2]
    return all(f"worker {worker_id} joined" in said for worker_id in ("prefill-0", "decode-0"))
