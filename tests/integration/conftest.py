"""The kvstore and Redis that tests ask for by fixture: real processes, killed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.kvstore_processes import KvstoreProcess, Process
from tests.integration.kvstore_workers import TTL_S
from tests.integration.redis_processes import RedisProcess


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in reversed(started):
        process.kill()


@pytest.fixture
async def redis(tmp_path: Path, processes: list[Process]) -> RedisProcess:
    server = RedisProcess(tmp_path / "redis.log")
    processes.append(server)
    return await server.start()


@pytest.fixture(params=["memory", "redis"])
async def kvstore(
    request: pytest.FixtureRequest, tmp_path: Path, processes: list[Process], redis: RedisProcess
) -> KvstoreProcess:
    """A running kvstore, once with each backend."""
    url = redis.url if request.param == "redis" else ""
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=url, ttl_s=TTL_S)
    processes.append(store)
    return await store.start()


@pytest.fixture
async def memory_kvstore(tmp_path: Path, processes: list[Process]) -> KvstoreProcess:
    store = KvstoreProcess(tmp_path / "kvstore.log", ttl_s=TTL_S)
    processes.append(store)
    return await store.start()


@pytest.fixture
async def redis_kvstore(tmp_path: Path, processes: list[Process], redis: RedisProcess) -> KvstoreProcess:
    store = KvstoreProcess(tmp_path / "kvstore.log", redis=redis.url, ttl_s=TTL_S)
    processes.append(store)
    return await store.start()
