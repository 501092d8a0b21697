"""What Redis keeps for the kvstore, and what the kvstore does when Redis fails, is slow, full or forgets."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from pathlib import Path

import redis.asyncio as redis_client

from baton.kv.events import Stored
from baton.rpc.cluster_watch import ClusterWatch
from tests.integration.kvstore_processes import (
    KvstoreProcess,
    Process,
    RedisProcess,
    until,
)
from tests.integration.kvstore_workers import (
    TTL_S,
    Publisher,
    chain,
    running,
    watch,
)
from tests.integration.slow_proxy import SlowProxy

UP = "baton_kvstore_redis_up"


WRITTEN = "baton_kvstore_redis_blocks_total"


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


async def test_a_slow_redis_and_a_killed_one_slow_nobody_down(
    tmp_path: Path, redis: RedisProcess, processes: list[Process]
) -> None:
    async with SlowProxy(redis.port).serving() as proxy:
        proxy.delay_s = 0.1
        store = KvstoreProcess(tmp_path / "kvstore.log", redis=proxy.url, ttl_s=TTL_S)
        processes.append(store)
        await store.start()
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
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    redis.ask("config", "set", "maxmemory", "2mb")
    store = redis_kvstore
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
        redis.ask("config", "set", "maxmemory", "0")
        await until(lambda: store.metric(UP) == 1, "Redis is written anew once it has room")
        store.kill()
        await store.start()
        assert "read 1 workers and 50001 blocks from Redis" in store.log
