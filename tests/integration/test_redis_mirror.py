"""What Redis keeps for the kvstore, and what the kvstore does when Redis fails, is slow, full or forgets."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from contextlib import AsyncExitStack
from pathlib import Path

from baton.kv.events import Removed
from baton.rpc.cluster_watch import ClusterWatch
from services.kvstore.redis_schema import RETENTION_S
from tests.integration.kvstore_processes import KvstoreProcess, Process, until
from tests.integration.kvstore_workers import (
    TTL_S,
    Publisher,
    chain,
    running,
    watch,
)
from tests.integration.redis_processes import RedisProcess
from tests.integration.slow_proxy import SlowProxy

UP = "baton_kvstore_redis_up"


WRITTEN = "baton_kvstore_redis_blocks_total"
LOST = "baton_kvstore_redis_lost_writes_total"
LAG = "baton_kvstore_redis_lag_seconds"


async def test_a_restarted_kvstore_starts_from_redis(redis_kvstore: KvstoreProcess) -> None:
    a, fresh = Publisher(redis_kvstore.address, "a"), watch(redis_kvstore)
    for _ in range(100):
        a.step()
    async with running(a.membership):
        before = watch(redis_kvstore)
        async with running(before):
            await until(lambda: a.agrees(before), "the kvstore has it all")
        await until(lambda: redis_kvstore.metric(WRITTEN), "Redis has it too")
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
    async with running(a.membership):
        a.store(1, 2)
        await until(lambda: redis_kvstore.metric(WRITTEN) == 2, "Redis has it")
        assert redis.ask("dbsize") == "3"
        for key in ("member", "blocks"):  # for when the kvstore dies with its worker
            assert 0 < int(redis.ask("ttl", f"baton:1:{{a}}:{key}")) <= RETENTION_S
    await until(lambda: redis.ask("dbsize") == "0", "nothing is left")


async def test_a_redis_that_forgot_is_written_anew(
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    """Nothing fails here: the keys are simply not where the kvstore left them."""
    big = [number.to_bytes(16, "big") for number in range(10_000)]
    a, seen = Publisher(redis_kvstore.address, "a"), watch(redis_kvstore)
    async with running(a.membership, seen):
        a.hold(big)
        await until(lambda: (redis_kvstore.metric(WRITTEN) or 0) >= 10_000, "Redis has it")
        redis.ask("flushdb")
        await until(lambda: (redis_kvstore.metric(WRITTEN) or 0) >= 20_000, "Redis has it again")
        await until(lambda: "Redis lost writes of worker a" in redis_kvstore.log, "the log says so")
        redis_kvstore.kill()
        await redis_kvstore.start()
        assert "read 1 workers and 10000 blocks from Redis" in redis_kvstore.log
        await until(lambda: seen.connected and seen.index.lookup(big) == {"a": 10_000}, "it is served")
        assert a.snapshots == 1


async def test_blocks_that_redis_lost_are_not_taken_for_gone_when_the_kvstore_restarts(
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    """An evicted key of blocks, beside a member that still says how far they had come."""
    a, seen = Publisher(redis_kvstore.address, "a"), watch(redis_kvstore)
    async with running(seen), running(a.membership):
        a.store(1, 2, 0)
        await until(lambda: redis_kvstore.metric(WRITTEN) == 3, "Redis has it")
        redis_kvstore.kill()
        redis.ask("del", "baton:1:{a}:blocks")
        await redis_kvstore.start()
        assert "Redis has lost blocks of worker a" in redis_kvstore.log
        await until(lambda: seen.connected and a.agrees(seen), "the worker was asked for them")


async def test_a_redis_that_evicts_is_warned_of_once_and_written_anew_when_it_no_longer_does(
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    a, seen = Publisher(redis_kvstore.address, "a"), watch(redis_kvstore)
    ids = [hashlib.md5(str(number).encode()).digest() for number in range(50_000)]
    async with running(a.membership, seen):
        await until(lambda: redis_kvstore.metric("baton_kvstore_workers") == 1, "the worker is known")
        redis.ask("config", "set", "maxmemory-policy", "allkeys-random")
        redis.ask("config", "set", "maxmemory", "2mb")
        a.hold(ids)
        await until(
            lambda: (redis_kvstore.metric(LOST) or 0) >= 3, "it loses what is written, time after time"
        )
        assert redis_kvstore.log.count("Redis lost writes") == 1
        assert (redis_kvstore.metric(LAG) or 0) > 1
        assert seen.index.lookup(ids) == {"a": 50_000}
        redis.ask("config", "set", "maxmemory", "0")
        await until(lambda: (redis_kvstore.metric(LAG) or 0) < 0.5, "Redis has all of it")
        redis_kvstore.kill()
        await redis_kvstore.start()
        assert "read 1 workers and 50000 blocks from Redis" in redis_kvstore.log


async def test_a_second_kvstore_on_the_same_database_does_no_lasting_harm(
    tmp_path: Path, redis: RedisProcess, redis_kvstore: KvstoreProcess, processes: list[Process]
) -> None:
    a, seen = Publisher(redis_kvstore.address, "a"), watch(redis_kvstore)
    second = KvstoreProcess(tmp_path / "second.log", redis=redis.url, ttl_s=0.5)
    processes.append(second)
    async with running(a.membership, seen):
        a.store(1, 2)
        await until(lambda: redis_kvstore.metric(WRITTEN) == 2, "Redis has it")
        await second.start()
        await until(lambda: "worker a did not come back" in second.log, "it waits for the other's worker")
        await until(lambda: redis_kvstore.metric(LOST) == 1, "and takes it out of Redis")
        a.step()
        held = str(len(a.held))
        await until(lambda: redis.ask("hlen", "baton:1:{a}:blocks") == held, "it is written anew")
        assert redis_kvstore.log.count("another kvstore writes to the same database") == 1
        assert a.agrees(seen)


async def test_many_workers_that_go_at_once_are_removed_in_short_steps(
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    """What Redis does at a time, other clients of it wait for: it may not grow with what is removed."""
    workers = [Publisher(redis_kvstore.address, f"w{number}") for number in range(150)]
    big = [hashlib.md5(str(number).encode()).digest() for number in range(30_000)]
    with redis.monitored() as commands:
        async with AsyncExitStack() as stack:
            for worker in workers:
                worker.store(1, 2)
                await stack.enter_async_context(running(worker.membership))
            workers[0].hold(big)
            everything = 2 * len(workers) + len(big)
            await until(lambda: (redis_kvstore.metric(WRITTEN) or 0) >= everything, "Redis has it")
            workers[0].membership.publish([Removed(big[20_000:])])
            key = "baton:1:{w0}:blocks"
            await until(lambda: redis.ask("hlen", key) == "20002", "some of one worker's blocks are gone")
        await until(lambda: redis.ask("dbsize") == "0", "nothing is left of any worker")
        removals = [command for command in commands() if command[0] in ("hdel", "unlink", "del", "srem")]
    # Those of one script: in blocks of a worker that goes on, and in keys, which are freed by another thread.
    fields = [len(command) - 2 for command in removals if command[0] == "hdel"]
    assert sum(fields) == 10_000
    assert max(fields) <= 1000
    keys = [len(command) - 1 for command in removals if command[0] == "unlink"]
    assert sum(keys) >= 2 * len(workers)
    assert max(keys) <= 2
    assert max(len(command) - 2 for command in removals if command[0] == "srem") <= 64


async def test_a_slow_redis_and_a_killed_one_slow_nobody_down(
    tmp_path: Path, redis: RedisProcess, processes: list[Process]
) -> None:
    async with SlowProxy(redis.port).serving() as proxy:
        proxy.delay_s = 0.1
        store = KvstoreProcess(tmp_path / "kvstore.log", redis=redis.url_at(proxy.address), ttl_s=TTL_S)
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
        a.hold(ids)
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
