"""Who is in the registry: workers that join, change, stop, die and are replaced, as real processes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from baton.rpc.v1 import kvstore_pb2, worker_pb2
from tests.integration.kvstore_processes import (
    KvstoreProcess,
    Process,
    until,
)
from tests.integration.kvstore_workers import (
    Publisher,
    Recorder,
    chain,
    running,
    watch,
    worker_process,
)
from tests.integration.redis_processes import RedisProcess


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
    redis: RedisProcess, redis_kvstore: KvstoreProcess
) -> None:
    seen = watch(redis_kvstore)
    async with running(seen), worker_process(redis_kvstore, "1") as process:
        await until(lambda: seen.peers and redis.ask("dbsize") == "3", "the worker is known")
        process.send_signal(signal.SIGSTOP)
        await until(lambda: not seen.peers and redis.ask("dbsize") == "0", "nothing of it is left")
        process.send_signal(signal.SIGCONT)
        await until(lambda: seen.peers, "the worker is back")


async def test_a_later_process_takes_over_a_worker_id_for_good(
    memory_kvstore: KvstoreProcess, caplog: pytest.LogCaptureFixture
) -> None:
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
            await until(lambda: "give each its own --worker-id" in caplog.text, "its log says why")
            assert f"the kvstore at {memory_kvstore.address} refuses" in caplog.text
            old.store(0)
            new.store(2, 2)
            await until(lambda: seen.index.lookup(chain(2, 2)) == {"a": 2}, "the new one publishes")
            assert seen.index.lookup(chain(0)) == {}
            assert heard.heard == ["added a/old", "gone a/old", "added a/new"]


async def test_nobody_is_gone_for_what_a_kvstore_did_not_hear_while_it_was_paused(
    tmp_path: Path, processes: list[Process]
) -> None:
    store = KvstoreProcess(tmp_path / "kvstore.log", ttl_s=1.0)
    processes.append(store)
    await store.start()
    a, heard = Publisher(store.address, "a"), Recorder()
    seen = watch(store, heard)
    async with running(seen):
        async with running(a.membership):
            a.store(1)
            await until(lambda: seen.index.lookup(chain(1)) == {"a": 1}, "a is known")
            await store.pause(3.0)
            a.store(1, 2)
            await until(lambda: seen.index.lookup(chain(1, 2)) == {"a": 2}, "the kvstore goes on")
            assert heard.heard == ["added a/1"]
        await until(lambda: not seen.peers, "a has left")
    assert (a.snapshots, heard.heard) == (1, ["added a/1", "gone a/1"])
