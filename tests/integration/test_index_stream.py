"""Do replicas of the index end up with what the workers hold, whatever is slow, full or too much?"""

from __future__ import annotations

import asyncio
import hashlib
from itertools import count, islice
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


async def test_a_full_index_forgets_what_routers_found_longest_ago_and_says_so(
    tmp_path: Path, processes: list[Process]
) -> None:
    store = KvstoreProcess(tmp_path / "kvstore.log", index_max_bytes=1 << 20)
    processes.append(store)
    await store.start()
    a, b, seen, late = (
        Publisher(store.address, "a"),
        Publisher(store.address, "b"),
        watch(store),
        watch(store),
    )
    names = (hashlib.md5(str(number).encode()).digest() for number in count())
    asked, unasked = list(islice(names, 100)), list(islice(names, 100))
    async with running(a.membership, b.membership, seen):
        a.hold([*asked, *unasked])
        await until(lambda: seen.index.lookup(asked) and seen.index.lookup(unasked), "both are there")
        reported = 0.0

        def news() -> bool:
            return (store.metric("baton_kvstore_found_chains_total") or 0) > reported

        while not store.metric("baton_index_evicted_blocks_total"):
            b.hold(list(islice(names, 1500)))
            if seen.index.keep_found:
                assert seen.index.lookup(asked) == {"a": 100}
                await until(news, "the kvstore hears of it")
                reported = store.metric("baton_kvstore_found_chains_total") or 0
            await asyncio.sleep(0.01)
        async with running(late):
            await late.ready()
            assert late.index.lookup(asked) == {"a": 100}
            assert late.index.lookup(unasked) == {}
            assert seen.index.lookup(unasked) == {"a": 100}, "a replica has a bound of its own"
    assert (store.metric("baton_index_bytes") or 0) <= 1 << 20
    assert store.log.count("forgets what was used least recently") == 1
