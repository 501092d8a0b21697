"""What the Redis backend keeps in memory for a Redis that nobody reaches."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry

from baton.kv.events import Stored
from baton.rpc.v1 import kvstore_pb2, worker_pb2
from services.kvstore.member import Member
from services.kvstore.metrics import RedisMetrics
from services.kvstore.redis import RedisBackend


def test_a_worker_that_is_gone_takes_no_memory_while_redis_is_away() -> None:
    registry = CollectorRegistry()
    backend = RedisBackend("redis://127.0.0.1:1/0", RedisMetrics(registry))
    assert registry.get_sample_value("baton_kvstore_redis_lag_seconds") == 0
    member = Member(kvstore_pb2.Worker(worker_id="a", incarnation="1"), worker_pb2.WorkerLoad())
    backend.member_changed(member)
    backend.blocks_changed(member, member.holdings.apply(Stored([bytes(16)]), 1))
    backend.member_gone(member)
    freed = weakref.ref(member)
    del member
    gc.collect()
    assert freed() is None
    assert (registry.get_sample_value("baton_kvstore_redis_lag_seconds") or 0) > 0


async def test_it_stops_though_a_write_loses_its_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `asyncio.wait_for` does before Python 3.12 when what it waits for is done at the same moment."""
    backend = RedisBackend("redis://127.0.0.1:1/0", RedisMetrics(CollectorRegistry()))
    writing = asyncio.Event()

    async def write() -> None:
        backend._dirty.clear()
        if not writing.is_set():
            writing.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    monkeypatch.setattr(backend, "_round", write)
    running = asyncio.create_task(backend.run())
    backend.member_changed(Member(kvstore_pb2.Worker(worker_id="a"), worker_pb2.WorkerLoad()))
    await writing.wait()
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=60)
    running.cancel()
    assert done
