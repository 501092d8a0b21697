"""Do replicas of the index end up with what the workers hold, whatever is slow, full or too much?"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from baton.rpc.kvstore_client import WorkerMembership
from tests.integration.kvstore_processes import (
    KvstoreProcess,
    Process,
    until,
)
from tests.integration.kvstore_workers import (
    Publisher,
    chain,
    running,
    watch,
)


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
