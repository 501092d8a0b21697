"""The kvstore and its clients as real processes that are killed and come back."""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest
import redis.asyncio as redis_client
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from baton.kv.events import Event, Removed, Stored, Tier
from baton.rpc.cluster_watch import ClusterWatch, Peer, PeerListener
from baton.rpc.kvstore_client import WorkerMembership
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc, worker_pb2
from tests.integration.kvstore_processes import (
    ROOT,
    KvstoreProcess,
    Process,
    RedisProcess,
    SecureRedisProcess,
    until,
)

TTL_S = 5.0


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in reversed(started):
        process.kill()


@pytest.fixture
async def redis(tmp_path: Path, processes: list[Process]) -> RedisProcess:
    server = RedisProcess(tmp_path / "redis.log")
    processes.append(server)
    return await server.start()


@pytest.fixture(params=["memory", "redis"])
async def kvstore(
    request: pytest.FixtureRequest, tmp_path: Path, processes: list[Process], redis: RedisProcess
) -> KvstoreProcess:
    """A running kvstore, once with each backend."""
    url = redis.url if request.param == "redis" else ""
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=url, ttl_s=TTL_S)
    processes.append(store)
    return await store.start()


@pytest.fixture
async def memory_kvstore(tmp_path: Path, processes: list[Process]) -> KvstoreProcess:
    store = KvstoreProcess(tmp_path / "kvstore.log", ttl_s=TTL_S)
    processes.append(store)
    return await store.start()


@pytest.fixture
async def redis_kvstore(tmp_path: Path, processes: list[Process], redis: RedisProcess) -> KvstoreProcess:
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=redis.url, ttl_s=TTL_S)
    processes.append(store)
    return await store.start()


@asynccontextmanager
async def running(*runners: WorkerMembership | ClusterWatch) -> AsyncIterator[None]:
    """Run clients for the length of the block."""
    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(runner.run()) for runner in runners]
        yield
        for task in started:
            task.cancel()


class Publisher:
    """A worker whose engine does random things; chains are paths in a tree, closed under prefixes."""

    def __init__(self, address: str, worker_id: str, incarnation: str = "1") -> None:
        self.held: dict[bytes, tuple[int, ...]] = {}
        self.snapshots = 0
        self.worker = kvstore_pb2.Worker(
            worker_id=worker_id,
            incarnation=incarnation,
            address="127.0.0.1:1",
            role=worker_pb2.ROLE_DECODE,
            total_blocks=100_000,
        )
        self.membership = WorkerMembership(address, self.worker, self._snapshot)
        self._random = random.Random(worker_id)

    async def _snapshot(self) -> Sequence[Event]:
        self.snapshots += 1
        return [Stored(list(self.held))]

    def store(self, *path: int) -> None:
        ids = chain(*path)
        self.held.update({block_id: path[: depth + 1] for depth, block_id in enumerate(ids)})
        self.membership.publish([Stored(ids)])

    def step(self) -> None:
        """What one engine step may do: store a chain, evict some leaves, or both."""
        rng = self._random
        self.store(*(rng.randrange(3) for _ in range(rng.randint(1, 8))))
        events = []
        for _ in range(rng.randrange(4)):
            parents = {path[:-1] for path in self.held.values()}
            leaf = rng.choice([i for i, path in self.held.items() if path not in parents])
            del self.held[leaf]
            events.append(Removed([leaf]))
            if not self.held:
                break
        self.membership.publish(events)

    def agrees(self, watch: ClusterWatch) -> bool:
        """Whether the replica has exactly these blocks for this worker."""
        worker_id = self.worker.worker_id
        index = watch.index
        mine = all(index.holders(i).get(worker_id) is Tier.DEVICE for i in self.held)
        gone = all(worker_id not in index.holders(i) for i in EVERY_BLOCK if i not in self.held)
        return mine and gone


def chain(*path: int) -> list[bytes]:
    return [bytes(path[: depth + 1]).rjust(16, b"\xff") for depth in range(len(path))]


def _tree(depth: int) -> Iterator[tuple[int, ...]]:
    if depth:
        for path in _tree(depth - 1):
            yield path
            if len(path) == depth - 1:
                for child in range(3):
                    yield (*path, child)
    else:
        yield ()


EVERY_BLOCK = [chain(*path)[-1] for path in _tree(8) if path]


class Recorder(PeerListener):
    """Writes down what happened to whom."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def worker_added(self, peer: Peer) -> None:
        self.heard.append(f"added {peer.worker.worker_id}/{peer.worker.incarnation}")

    def worker_gone(self, peer: Peer) -> None:
        self.heard.append(f"gone {peer.worker.worker_id}/{peer.worker.incarnation}")


def watch(store: Process, listener: PeerListener | None = None) -> ClusterWatch:
    return ClusterWatch(store.address, ttl_s=TTL_S, listener=listener)


@asynccontextmanager
async def worker_process(store: Process, incarnation: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.integration.registered_worker"]
    process = subprocess.Popen([*command, store.address, "w", incarnation, "100"], cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_two_subscribers_converge_to_the_publishers_under_random_events(
    kvstore: KvstoreProcess,
) -> None:
    a, b = Publisher(kvstore.address, "a"), Publisher(kvstore.address, "b")
    early, late = watch(kvstore), watch(kvstore)
    async with running(a.membership, b.membership, early):
        await early.ready()
        for _ in range(150):
            a.step()
            b.step()
            await asyncio.sleep(0)
        async with running(late):
            for _ in range(150):
                a.step()
                b.step()
                await asyncio.sleep(0)
            await late.ready()
            for one in (early, late):
                await until(lambda one=one: a.agrees(one) and b.agrees(one), "both replicas agree")
    # One at the start each: ordinary events needed no resync.
    assert (a.snapshots, b.snapshots) == (1, 1)


async def test_a_worker_in_the_registry_is_as_it_said(memory_kvstore: KvstoreProcess) -> None:
    a, seen = Publisher(memory_kvstore.address, "a"), watch(memory_kvstore)
    async with running(a.membership, seen):
        await until(lambda: "a" in seen.peers, "a is known")
        assert seen.peers["a"].worker == a.worker
        a.membership.report(worker_pb2.WorkerLoad(running=3, total_blocks=100, free_blocks=7))
        await until(lambda: seen.views()[0].running == 3 and seen.views()[0].free_blocks == 7, "its load")
        a.membership.report_reads({"b": 2e9, "c": 0.0})
        await until(lambda: seen.views()[0].read_bytes_per_s == {"b": 2e9}, "how fast it reads from b")
        changed = kvstore_pb2.Worker()
        changed.CopyFrom(a.worker)
        changed.host_bytes_per_s = 3e9
        changed.role = worker_pb2.ROLE_PREFILL
        a.membership.change(worker=changed, draining=True)
        await until(lambda: seen.peers["a"].worker == changed and seen.views()[0].draining, "its new role")
        assert (seen.views()[0].host_bytes_per_s, seen.views()[0].disk_bytes_per_s) == (3e9, 0.0)
        assert seen.views()[0].read_bytes_per_s == {"b": 2e9}
        assert seen.connected
        assert seen.lag_s == 0.0
    assert not seen.connected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_everybody_converges_again_after_a_kvstore_restart(
    kvstore: KvstoreProcess, number: signal.Signals
) -> None:
    a, heard = Publisher(kvstore.address, "a"), Recorder()
    first, second = watch(kvstore, heard), watch(kvstore)
    async with running(a.membership, first, second):
        a.store(1, 2, 0)
        for one in (first, second):
            await until(lambda one=one: one.index.lookup(chain(1, 2, 0)) == {"a": 3}, "before the restart")
        status = kvstore.stop(number)
        assert status == (0 if number is signal.SIGTERM else -signal.SIGKILL)
        await until(lambda: not first.connected and not second.connected, "the loss is noticed")
        assert first.lag_s < 30
        a.store(2, 1)
        assert first.index.lookup(chain(1, 2, 0)) == {"a": 3}
        assert [view.worker_id for view in first.views()] == ["a"]
        await kvstore.start()
        for one in (first, second):
            await until(lambda one=one: one.connected and a.agrees(one), "both agree after the restart")
        for _ in range(50):
            a.step()
        for one in (first, second):
            await until(lambda one=one: a.agrees(one), "events go on arriving")
    assert heard.heard == ["added a/1"]


async def test_a_worker_that_died_while_the_kvstore_was_away_goes_after_its_ttl(
    kvstore: KvstoreProcess,
) -> None:
    a, b, seen = Publisher(kvstore.address, "a"), Publisher(kvstore.address, "b"), watch(kvstore)
    async with running(a.membership, seen):
        async with running(b.membership):
            b.store(1)
            await until(
                lambda: seen.index.lookup(chain(1)) == {"b": 1} and len(seen.peers) == 2, "b is known"
            )
            kvstore.kill()
            await until(lambda: not seen.connected, "the loss is noticed")
        assert set(seen.peers) == {"a", "b"}
        await kvstore.start()
        await until(lambda: set(seen.peers) == {"a"}, "b is gone")
        assert seen.index.lookup(chain(1)) == {}


async def test_a_killed_worker_is_gone_with_its_blocks_and_a_new_one_replaces_it(
    kvstore: KvstoreProcess,
) -> None:
    heard = Recorder()
    seen = watch(kvstore, heard)
    ids = [number.to_bytes(16, "big") for number in range(100)]
    async with running(seen):
        async with worker_process(kvstore, "1") as process:
            await until(lambda: seen.index.lookup(ids) == {"w": 100}, "the worker is known")
            process.send_signal(signal.SIGKILL)
            await until(lambda: not seen.peers and not seen.index.lookup(ids), "the worker is gone")
        async with worker_process(kvstore, "2"):
            await until(lambda: seen.index.lookup(ids) == {"w": 100}, "the new one is known")
        await until(lambda: not seen.peers, "gone again")
    assert heard.heard == ["added w/1", "gone w/1", "added w/2", "gone w/2"]


async def test_a_stopped_worker_is_gone_after_its_ttl_and_back_when_it_goes_on(
    memory_kvstore: KvstoreProcess,
) -> None:
    seen = watch(memory_kvstore)
    async with running(seen), worker_process(memory_kvstore, "1") as process:
        await until(lambda: seen.peers, "the worker is known")
        process.send_signal(signal.SIGSTOP)
        await until(lambda: not seen.peers, "the worker is gone")
        process.send_signal(signal.SIGCONT)
        await until(lambda: seen.peers, "the worker is back")


async def test_a_later_process_takes_over_a_worker_id_for_good(memory_kvstore: KvstoreProcess) -> None:
    old, new = Publisher(memory_kvstore.address, "a", "old"), Publisher(memory_kvstore.address, "a", "new")
    heard = Recorder()
    seen = watch(memory_kvstore, heard)
    async with running(old.membership, seen):
        old.store(1, 1)
        await until(lambda: seen.index.lookup(chain(1, 1)) == {"a": 2}, "the old one is known")
        async with running(new.membership):
            new.store(2)
            await until(lambda: seen.index.lookup(chain(2)) == {"a": 1}, "the new one is known")
            assert seen.index.lookup(chain(1, 1)) == {}
            await until(lambda: not old.membership.connected, "the old one is out")
            old.store(0)
            new.store(2, 2)
            await until(lambda: seen.index.lookup(chain(2, 2)) == {"a": 2}, "the new one publishes")
            assert seen.index.lookup(chain(0)) == {}
            assert heard.heard == ["added a/old", "gone a/old", "added a/new"]


async def test_a_full_index_forgets_and_says_so(tmp_path: Path, processes: list[Process]) -> None:
    store = KvstoreProcess(tmp_path / "kvstore.log", index_max_bytes=1 << 20)
    processes.append(store)
    await store.start()
    ids = [hashlib.md5(str(number).encode()).digest() for number in range(20_000)]
    a, b, seen = Publisher(store.address, "a"), Publisher(store.address, "b"), watch(store)
    a.held, b.held = dict.fromkeys(ids, ()), dict.fromkeys(ids[:100], ())
    async with running(a.membership, b.membership):
        await until(lambda: store.metric("baton_kvstore_messages_total", verdict="replace") == 2, "all came")
        async with running(seen):
            await seen.ready()
            found = seen.index.lookup(ids)
            assert found["b"] == 100
            assert 2_000 < found["a"] < 20_000
    assert (store.metric("baton_index_bytes") or 0) <= 1 << 20
    assert store.metric("baton_index_evicted_blocks_total") == 20_000 - found["a"]
    assert store.log.count("forgets blocks") == 1


async def test_a_restarted_kvstore_starts_from_redis(redis_kvstore: KvstoreProcess) -> None:
    a, fresh = Publisher(redis_kvstore.address, "a"), watch(redis_kvstore)
    for _ in range(100):
        a.step()
    async with running(a.membership):
        before = watch(redis_kvstore)
        async with running(before):
            await until(lambda: a.agrees(before), "the kvstore has it all")
        await until(lambda: redis_kvstore.metric("baton_kvstore_redis_blocks_total"), "Redis has it too")
        redis_kvstore.stop(signal.SIGTERM)
        taken = a.snapshots
        await redis_kvstore.start()
        assert f"read 1 workers and {len(a.held)} blocks from Redis" in redis_kvstore.log
        async with running(fresh):
            await until(lambda: fresh.connected and a.agrees(fresh), "a new subscriber has it")
            a.step()
            await until(lambda: a.membership.connected and a.agrees(fresh), "events go on")
        assert a.snapshots == taken


async def test_losing_redis_costs_nothing_and_it_is_written_anew(
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    a, seen = Publisher(redis_kvstore.address, "a"), watch(redis_kvstore)
    async with running(a.membership, seen):
        a.store(1, 2, 3)
        await until(lambda: redis_kvstore.metric("baton_kvstore_redis_blocks_total") == 3, "Redis has it")
        redis.kill()
        a.store(2, 2)
        await until(lambda: redis_kvstore.metric("baton_kvstore_redis_up") == 0, "the loss is noticed")
        await until(lambda: seen.index.lookup(chain(2, 2)) == {"a": 2}, "events go on without Redis")
        assert "Redis is away, going on from memory" in redis_kvstore.log
        assert seen.connected
        a.store(0)
        await redis.start()
        await until(lambda: redis_kvstore.metric("baton_kvstore_redis_up") == 1, "Redis is back")
        a.store(0, 0)
        await until(lambda: a.agrees(seen), "events go on")
        # All of it is in the new, empty Redis: a kvstore killed now comes back with it.
        await until(
            lambda: (
                redis_kvstore.metric(
                    "baton_kvstore_redis_blocks_total",
                )
                == 3 + 6 + 2
            ),
            "written",
        )
        redis_kvstore.kill()
        await redis_kvstore.start()
        assert "read 1 workers and 7 blocks from Redis" in redis_kvstore.log


async def test_a_kvstore_starts_without_its_redis(
    tmp_path: Path, redis: RedisProcess, processes: list[Process]
) -> None:
    redis.kill()
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=redis.url)
    processes.append(store)
    await store.start()
    a, seen = Publisher(store.address, "a"), watch(store)
    async with running(a.membership, seen):
        a.store(1)
        await until(lambda: seen.index.lookup(chain(1)) == {"a": 1}, "it serves")
        assert store.metric("baton_kvstore_redis_up") == 0
        await redis.start()
        await until(lambda: store.metric("baton_kvstore_redis_up") == 1, "Redis is used when it comes")


async def test_a_gone_worker_leaves_nothing_in_redis(
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    a = Publisher(redis_kvstore.address, "a")
    async with redis_client.from_url(redis.url) as connection:
        async with running(a.membership):
            a.store(1, 2)
            await until(lambda: redis_kvstore.metric("baton_kvstore_redis_blocks_total") == 2, "Redis has it")
            assert await connection.dbsize() == 3
        while await connection.dbsize():
            await asyncio.sleep(0.01)


async def test_a_redis_that_forgot_is_written_anew(
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    """Nothing fails here: the keys are simply not where the kvstore left them."""
    big = [number.to_bytes(16, "big") for number in range(10_000)]
    a, seen = Publisher(redis_kvstore.address, "a"), watch(redis_kvstore)
    async with redis_client.from_url(redis.url) as connection, running(a.membership, seen):
        a.held = dict.fromkeys(big, ())
        a.membership.publish([Stored(big)])
        written = "baton_kvstore_redis_blocks_total"
        await until(lambda: (redis_kvstore.metric(written) or 0) >= 10_000, "Redis has it")
        await connection.flushdb()
        await until(lambda: (redis_kvstore.metric(written) or 0) >= 20_000, "Redis has it again")
        await until(lambda: "Redis lost writes of worker a" in redis_kvstore.log, "the log says so")
        redis_kvstore.kill()
        await redis_kvstore.start()
        assert "read 1 workers and 10000 blocks from Redis" in redis_kvstore.log
        await until(lambda: seen.connected and seen.index.lookup(big) == {"a": 10_000}, "it is served")
        assert a.snapshots == 1


async def test_redis_over_tls_with_a_password(tmp_path: Path, processes: list[Process]) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    server = SecureRedisProcess(tmp_path / "redis.log", key, certificate)
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=server.url)
    for process in (server, store):
        processes.append(process)
        await process.start()
    assert "read 0 workers and 0 blocks from Redis" in store.log
    a = Publisher(store.address, "a")
    async with running(a.membership):
        a.store(1)
        await until(lambda: store.metric("baton_kvstore_redis_blocks_total") == 1, "Redis has it")


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port"])
def test_a_url_that_is_not_one_is_refused_at_start(tmp_path: Path, url: str) -> None:
    command = [sys.executable, "-m", "services.kvstore", "--kvstore-port", "0", "--redis", url]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "--redis" in ended.stderr


async def test_what_does_not_fit_the_buffer_while_the_kvstore_is_away_comes_as_a_snapshot(
    memory_kvstore: KvstoreProcess,
) -> None:
    a, seen = Publisher(memory_kvstore.address, "a"), watch(memory_kvstore)
    a.membership = WorkerMembership(memory_kvstore.address, a.worker, a._snapshot, max_buffered_blocks=50)
    async with running(a.membership, seen):
        a.store(1)
        await until(lambda: seen.index.lookup(chain(1)) == {"a": 1}, "the kvstore has it")
        for _ in range(40):
            a.step()  # without a pause, so that the buffer overflows with the kvstore in reach
        await until(lambda: a.agrees(seen), "the replica agrees")
        assert a.snapshots == 2
        a.step()
        await until(lambda: a.agrees(seen), "events go on")
        assert a.snapshots == 2


class Calls:
    """Raw calls to a kvstore, for what the clients never do."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.registry = kvstore_pb2_grpc.RegistryStub(channel)
        self.index = kvstore_pb2_grpc.PrefixIndexStub(channel)

    async def refusal(self, call: grpc.aio.StreamStreamCall, *messages: object) -> tuple[str, str]:
        for message in messages:
            await call.write(message)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in call:
                pass
        return error.value.code().name, error.value.details() or ""


WORKER = kvstore_pb2.Worker(
    worker_id="w", incarnation="1", address="127.0.0.1:1", role=worker_pb2.ROLE_DECODE
)


def events(**fields: object) -> kvstore_pb2.IndexEvents:
    given = {"worker_id": "w", "incarnation": "1", "sequence": 1, "snapshot": True, **fields}
    return kvstore_pb2.IndexEvents(**given)  # type: ignore[arg-type]


def altered(**fields: object) -> kvstore_pb2.Beat:
    worker = kvstore_pb2.Worker()
    worker.CopyFrom(WORKER)
    worker.MergeFrom(kvstore_pb2.Worker(**fields))  # type: ignore[arg-type]
    return kvstore_pb2.Beat(worker=worker)


async def test_messages_that_make_no_sense_are_refused_and_the_kvstore_goes_on(
    memory_kvstore: KvstoreProcess,
) -> None:
    stored = kvstore_pb2.IndexEvent.STORED
    device = kvstore_pb2.TIER_DEVICE
    bad_events = {
        "block_ids": [
            events(events=[{"kind": stored, "tier": device, "block_ids": b"x" * 17}]),
            events(events=[{"kind": stored, "tier": device, "block_ids": b"x" * 16 * 65_537}]),
        ],
        "kind": [events(events=[{"kind": 0, "tier": device}]), events(events=[{"kind": 9, "tier": device}])],
        "tier": [events(events=[{"kind": stored, "tier": 0}]), events(events=[{"kind": stored, "tier": 8}])],
        "sequence": [events(sequence=0)],
        "worker_id": [events(worker_id=""), events(worker_id="w" * 257)],
        "incarnation": [events(incarnation="")],
        "events": [events(events=[{"kind": 3}] * 16_385)],
    }
    point = {"size": 5, "seconds": 1.0}
    bad_beats = {
        "worker_id": [kvstore_pb2.Beat(), altered(worker_id="w" * 257)],
        "role": [altered(role=7)],
        "prefill_curve": [altered(prefill_curve=[point, point]), altered(prefill_curve=[{"size": 0}])],
        "decode_curve": [altered(decode_curve=[{"size": 1, "seconds": float("nan")}])],
    }
    async with AsyncExitStack() as stack:
        calls = Calls(await stack.enter_async_context(grpc.aio.insecure_channel(memory_kvstore.address)))
        join = calls.registry.Join()
        await join.write(kvstore_pb2.Beat(worker=WORKER))
        assert (await join.read()).ttl_s == TTL_S
        for field, messages in bad_events.items():
            for message in messages:
                code, details = await calls.refusal(calls.index.Publish(), message)
                assert (code, field in details) == ("INVALID_ARGUMENT", True), (field, details)
        for field, beats in bad_beats.items():
            for beat in beats:
                code, details = await calls.refusal(calls.registry.Join(), beat)
                assert (code, field in details) == ("INVALID_ARGUMENT", True), (field, details)
        code, _ = await calls.refusal(calls.index.Publish(), events(), events(worker_id="v"))
        assert code == "INVALID_ARGUMENT"
        for stranger in (events(worker_id="v"), events(incarnation="2")):
            code, _ = await calls.refusal(calls.index.Publish(), stranger)
            assert code == "FAILED_PRECONDITION"
        publish = calls.index.Publish()
        await publish.write(events(sequence=7, snapshot=False))
        assert (await publish.read()).resync
        await publish.write(
            events(sequence=9, events=[{"kind": stored, "tier": device, "block_ids": b"x" * 32}])
        )
        assert (await publish.read()).acknowledged == 9
        await publish.write(events(sequence=11, snapshot=False))
        assert (await publish.read()).resync
        join.cancel()
        publish.cancel()
        seen = watch(memory_kvstore)
        async with running(seen):
            await seen.ready()
            await until(lambda: not seen.peers, "the worker is gone")


async def test_a_subscriber_that_does_not_read_is_cut_off_and_the_others_are_not(
    memory_kvstore: KvstoreProcess,
) -> None:
    a, seen = Publisher(memory_kvstore.address, "a"), watch(memory_kvstore)
    ids = [number.to_bytes(16, "big") for number in range(60_000)]
    async with grpc.aio.insecure_channel(memory_kvstore.address) as channel, running(a.membership, seen):
        slow = Calls(channel).index.Subscribe(kvstore_pb2.SubscribeRequest())
        assert (await slow.read()).snapshot_done
        await until(
            lambda: (
                memory_kvstore.metric("baton_kvstore_messages_total", verdict="replace") == 1
                and seen.connected
            ),
            "all are there",
        )
        for count in range(30):
            a.membership.publish([Stored(ids)])
            await until(
                lambda count=count: (
                    (memory_kvstore.metric("baton_kvstore_messages_total", verdict="apply") or 0) > count
                ),
                "the kvstore has taken it",
            )
        with pytest.raises(grpc.aio.AioRpcError, match="subscribe again"):
            while True:
                await slow.read()
        await until(lambda: seen.index.lookup(ids) == {"a": 60_000}, "the other one has it")
        assert memory_kvstore.metric("baton_kvstore_slow_subscribers_total") == 1


async def test_health_reflection_and_metrics(memory_kvstore: KvstoreProcess) -> None:
    with grpc.insecure_channel(memory_kvstore.address) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert {"baton.v1.Registry", "baton.v1.PrefixIndex", "grpc.health.v1.Health"} <= names
        for service in ("", "baton.v1.Registry", "baton.v1.PrefixIndex"):
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=10
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert memory_kvstore.metric("baton_kvstore_workers") == 0
    assert memory_kvstore.metric("baton_kvstore_blocks") == 0
