"""A prefix that went down to host memory or disk comes back with the same tokens; a damaged one is a miss."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import BLOCK, counter, fresh_prompt, nothing_is_held, pulls, until
from tests.integration.worker_session import generate, pull_from

BLOCKS = 100
BLOCK_BYTES = 6 * 2 * 4 * 32 * BLOCK * 4  # of the bundled model in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def tiered(start_cluster: StartCluster, folder: Path) -> Iterator[Cluster]:
    """Two hybrid workers, each with little on the device, more in host memory, most on disk."""
    flags = ("--hybrid", "2", "--kv-blocks", str(BLOCKS), "--kv-host-bytes", str(160 * BLOCK_BYTES))
    disk = ("--kv-disk-path", str(folder), "--kv-disk-bytes", str(400 * BLOCK_BYTES))
    with start_cluster(*flags, *disk) as up:
        yield up


def fetched(cluster: Cluster, worker_id: str, tier: str) -> float:
    address = cluster.status(worker_id).metrics_address
    return counter(address, "baton_kv_tier_fetched_blocks_total", tier=tier)


def push_down(cluster: Cluster, worker_id: str, blocks: int) -> None:
    """Run other prompts, so that what was there before goes down. Each is shorter than the host slots that
    are kept free, for of more than those the oldest would be dropped instead of written to disk."""
    for _ in range(0, blocks, 16):
        generate(cluster, worker_id, fresh_prompt(16 * BLOCK), max_tokens=1)


def wait_for_disk(cluster: Cluster, worker_id: str, blocks: int) -> None:
    def on_disk() -> int:
        return int(cluster.status(worker_id).load.disk_bytes) // BLOCK_BYTES

    until(lambda: on_disk() >= blocks, on_disk)


def registered(cluster: Cluster) -> dict[str, kvstore_pb2.RegistryUpdate.Change]:
    with grpc.insecure_channel(cluster.kvstore_address) as channel:
        registry = kvstore_pb2_grpc.RegistryStub(channel)
        snapshot = next(iter(registry.Watch(kvstore_pb2.WatchRequest(), timeout=60)))
    return {change.worker.worker_id: change for change in snapshot.changes}


def test_the_registry_is_told_how_fast_tiers_and_peers_are_read(tiered: Cluster) -> None:
    def rates() -> list[dict[str, float]]:
        return [dict(change.read_bytes_per_s) for change in registered(tiered).values()]

    until(lambda: all(rates()), rates)
    found = registered(tiered)
    assert set(found["hybrid-0"].read_bytes_per_s) == {"hybrid-1"}
    assert found["hybrid-0"].read_bytes_per_s["hybrid-1"] > 1e6
    for change in found.values():
        assert change.worker.host_bytes_per_s > 1e6
        assert change.worker.disk_bytes_per_s > 1e6


def test_a_prefix_comes_back_from_host_memory(tiered: Cluster) -> None:
    prompt = fresh_prompt(60 * BLOCK + 3)
    expected, _ = generate(tiered, "hybrid-0", prompt)
    push_down(tiered, "hybrid-0", 100)
    before = fetched(tiered, "hybrid-0", "host")
    tokens, report = generate(tiered, "hybrid-0", prompt)
    assert tokens == expected
    assert report.cached_tokens == 60 * BLOCK
    assert fetched(tiered, "hybrid-0", "host") > before
    until(lambda: nothing_is_held(tiered), "nothing is held")


def test_a_prefix_comes_back_from_disk_and_peers_can_pull_it(tiered: Cluster, folder: Path) -> None:
    prompt = fresh_prompt(60 * BLOCK + 3)
    expected, _ = generate(tiered, "hybrid-0", prompt)
    push_down(tiered, "hybrid-0", 320)
    wait_for_disk(tiered, "hybrid-0", 60)
    before = fetched(tiered, "hybrid-0", "disk")
    tokens, report = generate(tiered, "hybrid-1", prompt, pull=pull_from(tiered, "hybrid-0", 60))
    assert tokens == expected
    assert report.pulled_tokens == 60 * BLOCK
    assert pulls(tiered, "hybrid-1", "pulled") == 1
    assert fetched(tiered, "hybrid-0", "disk") == before + 60
    until(lambda: nothing_is_held(tiered), "nothing is held")
    assert list(folder.iterdir()) == []


def test_a_damaged_file_is_a_miss_and_the_answer_is_right(tiered: Cluster) -> None:
    prompt = fresh_prompt(60 * BLOCK + 3)
    expected, _ = generate(tiered, "hybrid-0", prompt)
    push_down(tiered, "hybrid-0", 320)
    wait_for_disk(tiered, "hybrid-0", 60)
    damage_disk(tiered.pids()["hybrid-0"])
    tokens, report = generate(tiered, "hybrid-0", prompt)
    assert tokens == expected
    assert report.cached_tokens == 0
    address = tiered.status("hybrid-0").metrics_address
    assert counter(address, "baton_kv_tier_misses_total", tier="disk", reason="checksum") == 60
    again, report = generate(tiered, "hybrid-0", prompt)
    assert again == expected
    assert report.cached_tokens == 60 * BLOCK
    until(lambda: nothing_is_held(tiered), "nothing is held")


def test_workers_that_pull_from_each_other_under_pressure_keep_their_answers(tiered: Cluster) -> None:
    """More is asked for at once than the pools hold, so blocks move on every path there is."""
    workers = ("hybrid-0", "hybrid-1")
    prompts = [fresh_prompt(30 * BLOCK + number) for number in range(5)]
    expected = [generate(tiered, workers[number % 2], one)[0] for number, one in enumerate(prompts)]
    pulls_of = {worker: pull_from(tiered, worker, 30) for worker in workers}

    def again(number: int) -> bool:
        here, there = workers[number % 2], workers[1 - number % 2]
        which = number % 5
        return generate(tiered, here, prompts[which], pull=pulls_of[there])[0] == expected[which]

    with ThreadPoolExecutor(10) as threads:
        assert all(threads.map(again, range(40)))
    until(lambda: nothing_is_held(tiered), lambda: [tiered.status(worker) for worker in workers])


def damage_disk(pid: int) -> None:
    """Overwrite the worker's nameless file, which only its descriptor still leads to."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        if "(deleted)" in str(descriptor.readlink()) and descriptor.stat().st_size == 400 * BLOCK_BYTES:
            with descriptor.open("r+b") as file:
                file.write(os.urandom(400 * BLOCK_BYTES))
            return
    raise AssertionError("the worker has no file open")
