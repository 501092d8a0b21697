"""The kvstore on every kind of Redis: alone, behind Sentinels, as a Cluster; with TLS and accounts."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from baton.config import BadSetting
from services.kvstore.redis_url import connect
from tests.integration.kvstore_processes import (
    ROOT,
    KvstoreProcess,
    Process,
    RedisNodeProcess,
    RedisProcess,
    SecureRedisProcess,
    SentinelProcess,
    form_redis_cluster,
    until,
)
from tests.integration.kvstore_workers import (
    TTL_S,
    Publisher,
    running,
)

WRITTEN = "baton_kvstore_redis_blocks_total"


async def kvstore(tmp_path: Path, processes: list[Process], url: str) -> KvstoreProcess:
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=url, ttl_s=TTL_S)
    processes.append(store)
    return await store.start()


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
        used = [int(node.ask("dbsize")) for node in nodes]
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
