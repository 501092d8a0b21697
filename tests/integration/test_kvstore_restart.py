"""What becomes of workers and replicas when the kvstore is killed or stopped and comes back."""

from __future__ import annotations

import signal

import pytest

from tests.integration.kvstore_processes import (
    KvstoreProcess,
    until,
)
from tests.integration.kvstore_workers import (
    Publisher,
    Recorder,
    chain,
    running,
    watch,
)


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
