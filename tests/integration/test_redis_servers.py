"""The kvstore on every kind of Redis: alone, behind Sentinels, as a Cluster; with TLS and accounts."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from baton.config import BadSetting
from services.kvstore.redis_url import connect
from tests.integration.kvstore_processes import ROOT, KvstoreProcess, Process, until
from tests.integration.kvstore_workers import TTL_S, Publisher, running
from tests.integration.redis_processes import (
    PASSWORD,
    RedisNodeProcess,
    RedisProcess,
    SentinelProcess,
    Tls,
    form_redis_cluster,
)

WRITTEN = "baton_kvstore_redis_blocks_total"


async def kvstore(tmp_path: Path, processes: list[Process], url: str) -> KvstoreProcess:
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=url, ttl_s=TTL_S)
    processes.append(store)
    return await store.start()


@pytest.fixture(params=["clear", "tls"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Tls | None:
    return Tls.make(tmp_path) if request.param == "tls" else None


async def test_one_server_is_all_it_takes(tmp_path: Path, processes: list[Process], tls: Tls | None) -> None:
    server = RedisProcess(tmp_path / "redis.log", tls)
    processes.append(server)
    await server.start()
    store = await kvstore(tmp_path, processes, server.url)
    a = Publisher(store.address, "a")
    async with running(a.membership):
        a.store(1, 2)
        await until(lambda: store.metric(WRITTEN) == 2, "Redis has it")
        store.kill()
        await store.start()
        assert "read 1 workers and 2 blocks from Redis" in store.log
        await until(lambda: store.metric("baton_kvstore_workers") == 1, "the worker is back")
    await until(lambda: server.ask("dbsize") == "0", "nothing is left when the worker has gone")


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    tmp_path: Path, processes: list[Process]
) -> None:
    server = RedisProcess(tmp_path / "redis.log", Tls.make(tmp_path))
    processes.append(server)
    await server.start()
    store = await kvstore(tmp_path, processes, server.url.partition("?")[0])
    assert "CERTIFICATE_VERIFY_FAILED" in store.log
    assert PASSWORD not in store.log


async def test_a_cluster_keeps_every_workers_blocks(
    tmp_path: Path, processes: list[Process], tls: Tls | None
) -> None:
    nodes = [RedisNodeProcess(tmp_path / f"redis-{number}.log", tls) for number in range(3)]
    processes += nodes
    for node in nodes:
        await node.start()
    store = await kvstore(tmp_path, processes, await form_redis_cluster(nodes))
    publishers = [Publisher(store.address, f"w{number}") for number in range(6)]
    async with AsyncExitStack() as stack:
        for publisher in publishers:
            await stack.enter_async_context(running(publisher.membership))
            publisher.store(1, 2, 0)
        await until(lambda: store.metric(WRITTEN) == 18, "the cluster has it")
        used = [int(node.ask("dbsize")) for node in nodes]
        assert sum(keys > 0 for keys in used) > 1, "the workers' keys lie on several nodes"
        store.kill()
        await store.start()
        assert "read 6 workers and 18 blocks from Redis" in store.log


async def test_sentinels_say_where_redis_is_also_after_a_failover(
    tmp_path: Path, processes: list[Process], tls: Tls | None
) -> None:
    master, replica = (RedisProcess(tmp_path / f"{name}.log", tls) for name in ("master", "replica"))
    sentinel = SentinelProcess(tmp_path / "sentinel.log", master)
    processes += [master, replica, sentinel]
    await master.start()
    await replica.start()
    master.ask("config", "set", "repl-diskless-sync-delay", "0")
    replica.ask("replicaof", "127.0.0.1", str(master.port))
    key = "baton:1:{a}:blocks"
    await sentinel.start()
    store = await kvstore(tmp_path, processes, sentinel.url)
    a = Publisher(store.address, "a")
    async with running(a.membership):
        a.store(1, 2)
        await until(lambda: store.metric(WRITTEN) == 2, "Redis has it")
        await until(lambda: replica.ask("hlen", key) == "2", "the replica has it too")
        await until(lambda: "+slave slave" in sentinel.log, "the Sentinel knows the replica")
        master.kill()
        await until(lambda: "+switch-master" in sentinel.log, "the replica has taken over")
        a.store(1, 2, 0)
        await until(lambda: replica.ask("hlen", key) == "3", "it has what came since")
        store.kill()
        await store.start()
        assert "read 1 workers and 3 blocks from Redis" in store.log


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port"])
def test_a_url_that_is_not_one_is_refused_at_start(tmp_path: Path, url: str) -> None:
    command = [sys.executable, "-m", "services.kvstore", "--kvstore-port", "0", "--redis", url]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "--redis" in ended.stderr


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
