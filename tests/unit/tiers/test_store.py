"""Blocks come back from host memory and disk as they went down; what is not the same is a named miss."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baton.errors import BatonError
from baton.kv.events import Tier
from baton.kv.lower import Held, Spill
from baton.tiers.disk import BlockFile
from baton.tiers.store import TierStore

SHAPE = (6, 2, 5)


@pytest.fixture
def disk(tmp_path: Path) -> BlockFile:
    return BlockFile(tmp_path, 4, 40)


@pytest.fixture
def store(disk: BlockFile) -> Iterator[TierStore]:
    store = TierStore([torch.zeros(SHAPE)], 4, disk)
    yield store
    store.close()


def pool_of(store: TierStore) -> torch.Tensor:
    return store._parts[0].pool.view(torch.float32).view(SHAPE)


def fetched(store: TierStore, places: list[tuple[Tier, int]], blocks: list[int]) -> list[str]:
    done = threading.Event()
    reasons: list[str] = []
    held = [Held(b"", None, tier, slot) for tier, slot in places]
    store.fetch(held, blocks, lambda result: (reasons.extend(result), done.set()))  # type: ignore[func-returns-value]
    assert done.wait(10)
    return reasons


def spilled(store: TierStore, host_slot: int, disk_slot: int) -> bool:
    done = threading.Event()
    result: list[bool] = []
    spill = Spill(Held(b"", None, Tier.HOST, host_slot), disk_slot)
    store.spill([spill], lambda _, ok: (result.append(ok), done.set()))  # type: ignore[func-returns-value]
    assert done.wait(10)
    return result[0]


def test_a_block_comes_back_from_host_and_disk(store: TierStore) -> None:
    pool = pool_of(store)
    pool[2] = torch.arange(10.0).view(2, 5)
    store.copy_down(2, 3)
    store.settle()
    pool[2] = -1
    assert fetched(store, [(Tier.HOST, 3)], [0]) == [""]
    assert spilled(store, 3, 1)
    assert fetched(store, [(Tier.DISK, 1)], [5]) == [""]
    assert torch.equal(pool[0], torch.arange(10.0).view(2, 5))
    assert torch.equal(pool[5], pool[0])
    assert (pool[1:5] == torch.tensor([0.0, -1, 0, 0]).view(4, 1, 1)).all()


def test_a_changed_and_a_shortened_file_are_misses_from_there_on(store: TierStore, disk: BlockFile) -> None:
    for slot in range(3):
        store.copy_down(slot, slot)
        assert spilled(store, slot, slot)
    places = [(Tier.DISK, slot) for slot in range(3)]
    disk._file.seek(45)
    disk._file.write(b"x")
    assert fetched(store, places, [0, 1, 2]) == ["", "checksum", "checksum"]
    disk._file.truncate(30)
    assert fetched(store, places, [0, 1, 2]) == ["short"] * 3


def test_the_file_has_no_name_and_its_room(tmp_path: Path) -> None:
    file = BlockFile(tmp_path, 10, 4096)
    assert list(tmp_path.iterdir()) == []
    file.close()
    with pytest.raises(BatonError, match="--kv-disk-path /nowhere"):
        BlockFile(Path("/nowhere"), 1, 1)
    with pytest.raises(BatonError, match="has no room for"):
        BlockFile(tmp_path, 2**40, 4096)


def test_a_full_disk_costs_the_blocks_and_is_said_once(
    store: TierStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    caplog.set_level(logging.INFO, "baton.tiers.store")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert [spilled(store, slot, slot) for slot in range(3)] == [False] * 3
        assert fetched(store, [(Tier.DISK, 0)], [0]) == ["checksum"]
    assert spilled(store, 0, 0)
    assert fetched(store, [(Tier.DISK, 0)], [0]) == [""]
    (cannot, again) = [record.getMessage() for record in caplog.records]
    assert "cannot be written to --kv-disk-path" in cannot
    assert "No space left" in cannot
    assert "again" in again


def test_a_write_that_stopped_halfway_leaves_a_miss(
    store: TierStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert spilled(store, 0, 0)
    pwrite, left = os.pwrite, [10]

    def dying(file: int, data: memoryview, at: int) -> int:
        if not left:
            raise OSError(errno.EIO, "Input/output error")
        return pwrite(file, data[: left.pop()], at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", dying)
        assert not spilled(store, 1, 0)
    assert fetched(store, [(Tier.DISK, 0)], [0]) == ["checksum"]


def test_a_disk_that_cannot_be_read_is_a_miss(store: TierStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    assert spilled(store, 0, 0)
    monkeypatch.setattr(os, "preadv", broken)
    assert fetched(store, [(Tier.DISK, 0), (Tier.HOST, 1)], [0, 1]) == ["io_error"] * 2


def test_the_folder_may_go_while_the_worker_runs(store: TierStore, tmp_path: Path) -> None:
    tmp_path.rmdir()
    assert spilled(store, 0, 0)
    assert fetched(store, [(Tier.DISK, 0)], [0]) == [""]


def test_a_folder_that_takes_no_files_is_refused_with_its_flag() -> None:
    with pytest.raises(BatonError, match="--kv-disk-path /proc"):
        BlockFile(Path("/proc"), 1, 4096)


def test_another_process_finds_nothing_of_the_last_one(tmp_path: Path) -> None:
    for shape in (SHAPE, (6, 4, 5)):  # blocks of another model
        store = TierStore([torch.ones(shape)], 2, BlockFile(tmp_path, 2, shape[1] * shape[2] * 4))
        assert fetched(store, [(Tier.DISK, 0)], [0]) == ["checksum"]
        assert spilled(store, 0, 0)
        store.close()
        assert list(tmp_path.iterdir()) == []


def test_reads_correct_the_rate_that_was_measured_at_start() -> None:
    store = TierStore([torch.zeros((2, 512, 1024))], 2, None)
    store.measure([0, 1])
    store._rates.begin(Tier.HOST, 1.0)
    assert fetched(store, [(Tier.HOST, 0), (Tier.HOST, 1)], [0, 1]) == ["", ""]
    assert store.read_rates()[Tier.HOST] > 1e6
    store.close()


def test_rates_are_measured(store: TierStore) -> None:
    store.measure([0, 1, 2])
    rates = store.read_rates()
    assert set(rates) == {Tier.HOST, Tier.DISK}
    assert min(rates.values()) > 0
