"""What the Redis backend keeps in memory for a Redis that nobody reaches."""

from __future__ import annotations

import gc
import weakref

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
