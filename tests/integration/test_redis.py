"""The kvstore on every kind of Redis, and on one that fails, is slow or is full, all of them real."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest

from baton.config import BadSetting
from baton.kv.events import Stored
from baton.rpc.cluster_watch import ClusterWatch
from services.kvstore.redis_url import connect
from tests.integration.kvstore_processes import (
    KvstoreProcess,
    Process,
    RedisNodeProcess,
    RedisProcess,
    SentinelProcess,
    form_redis_cluster,
    free_port,
    until,
)
from tests.integration.test_kvstore import TTL_S, Publisher, chain, running

UP = "baton_kvstore_redis_up"
WRITTEN = "baton_kvstore_redis_blocks_total"


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in reversed(started):
        process.kill()


async def kvstore(tmp_path: Path, processes: list[Process], url: str) -> KvstoreProcess:
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=url, ttl_s=TTL_S)
    processes.append(store)
    return await store.start()


def ask(redis: RedisProcess, *command: str) -> str:
    """What redis-cli prints for the command."""
    cli = ["redis-cli", "-p", str(redis.port), *command]
    return subprocess.run(cli, check=True, capture_output=True, text=True).stdout.strip()


async def test_a_cluster_with_an_acl_user_keeps_every_workers_blocks(
    tmp_path: Path, processes: list[Process]
) -> None:
    nodes = [RedisNodeProcess(tmp_path / f"redis-{number}.log") for number in range(3)]
    processes += nodes
    for node in nodes:
        await node.start()
    await form_redis_cluster(nodes)
    addresses = ",".join(node.address for node in nodes)
    store = await kvstore(tmp_path, processes, f"redis+cluster://baton:secret@{addresses}")
    publishers = [Publisher(store.address, f"w{number}") for number in range(6)]
    async with AsyncExitStack() as stack:
        for publisher in publishers:
            await stack.enter_async_context(running(publisher.membership))
            publisher.store(1, 2, 0)
        await until(lambda: store.metric(WRITTEN) == 18, "the cluster has it")
        used = [int(ask(node, "dbsize")) for node in nodes]
        assert sum(keys > 0 for keys in used) > 1, "the workers' keys lie on several nodes"
        store.kill()
        await store.start()
        assert "read 6 workers and 18 blocks from Redis" in store.log


async def test_sentinels_say_where_redis_is_also_after_a_failover(
    tmp_path: Path, processes: list[Process]
) -> None:
    master, replica = RedisProcess(tmp_path / "master.log"), RedisProcess(tmp_path / "replica.log")
    sentinel = SentinelProcess(tmp_path / "sentinel.log", master)
    processes += [master, replica, sentinel]
    await master.start()
    await replica.start()
    ask(master, "config", "set", "repl-diskless-sync-delay", "0")
    ask(replica, "replicaof", "127.0.0.1", str(master.port))
    key = "baton:1:{a}:blocks"
    await sentinel.start()
    store = await kvstore(tmp_path, processes, sentinel.url)
    a = Publisher(store.address, "a")
    async with running(a.membership):
        a.store(1, 2)
        await until(lambda: store.metric(WRITTEN) == 2, "Redis has it")
        await until(lambda: ask(replica, "hlen", key) == "2", "the replica has it too")
        await until(lambda: "+slave slave" in sentinel.log, "the Sentinel knows the replica")
        master.kill()
        await until(lambda: "+switch-master" in sentinel.log, "the replica has taken over")
        a.store(1, 2, 0)
        await until(lambda: ask(replica, "hlen", key) == "3", "it has what came since")
        store.kill()
        await store.start()
        assert "read 1 workers and 3 blocks from Redis" in store.log


class SlowProxy:
    """Passes bytes on to `port` and back, `delay_s` seconds late each way; `port` here is its own."""

    def __init__(self, to_port: int) -> None:
        self.port = free_port()
        self.delay_s = 0.0
        self._to_port = to_port

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        with closing(server):
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass_on(reader, there_writer))
                tasks.create_task(self._pass_on(there_reader, writer))
        except* OSError:
            pass

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()


async def test_a_slow_redis_and_a_killed_one_slow_nobody_down(
    tmp_path: Path, processes: list[Process]
) -> None:
    redis = RedisProcess(tmp_path / "redis.log")
    processes.append(redis)
    await redis.start()
    proxy = SlowProxy(redis.port)
    async with proxy.serving():
        proxy.delay_s = 0.1
        store = await kvstore(tmp_path, processes, f"redis://127.0.0.1:{proxy.port}/0")
        a, b = Publisher(store.address, "a"), Publisher(store.address, "b")
        seen = ClusterWatch(store.address, ttl_s=TTL_S)
        async with running(a.membership, b.membership, seen):
            await seen.ready()
            for round_ in range(4):
                for _ in range(100):
                    a.step()
                    b.step()
                    await asyncio.sleep(0)
                await until(lambda: a.agrees(seen) and b.agrees(seen), "the replica has it all")
                if round_ == 1:
                    redis.kill()
                    await until(lambda: store.metric(UP) == 0, "the metric says that Redis is away")
                if round_ == 2:
                    await redis.start()
            assert seen.connected
            assert a.membership.connected
            assert (a.snapshots, b.snapshots) == (1, 1)
            await until(lambda: store.metric(UP) == 1, "Redis is back")


async def test_a_full_redis_costs_nothing_but_what_it_cannot_keep(
    tmp_path: Path, processes: list[Process]
) -> None:
    redis = RedisProcess(tmp_path / "redis.log")
    processes.append(redis)
    await redis.start()
    ask(redis, "config", "set", "maxmemory", "2mb")
    store = await kvstore(tmp_path, processes, redis.url)
    a, seen = Publisher(store.address, "a"), ClusterWatch(store.address, ttl_s=TTL_S)
    ids = [hashlib.md5(str(number).encode()).digest() for number in range(50_000)]
    async with running(a.membership, seen):
        await until(lambda: store.metric(UP) == 1, "Redis is used")
        a.held = dict.fromkeys(ids, ())
        a.membership.publish([Stored(ids)])
        await until(lambda: store.metric(UP) == 0, "the metric says that Redis takes no writes")
        await until(lambda: seen.index.lookup(ids) == {"a": 50_000}, "the replica has all")
        a.store(1)
        await until(lambda: seen.index.lookup(chain(1)) == {"a": 1}, "events go on")
        assert (store.metric("baton_kvstore_redis_failures_total") or 0) >= 1
        ask(redis, "config", "set", "maxmemory", "0")
        await until(lambda: store.metric(UP) == 1, "Redis is written anew once it has room")
        store.kill()
        await store.start()
        assert "read 1 workers and 50001 blocks from Redis" in store.log


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://localhost",
        "redis+sentinel://localhost/main/zero",
        "redis+sentinel://localhost/main?colour=red",
        "redis+cluster://localhost/1",
        "redis+cluster://",
        "redis+cluster://localhost:port",
        "redis+other://localhost",
        "localhost:6379",
    ],
)
def test_a_url_that_names_no_redis_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(BadSetting, match="--redis must be") as error:
        connect(url.replace("//", "//user:hidden@", 1))
    assert "hidden" not in error.value.message
