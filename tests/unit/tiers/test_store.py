"""Blocks come back from host memory and disk as they went down; what is not the same is a named miss."""

from __future__ import annotations

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
    store = TierStore(torch.zeros(SHAPE), 4, disk)
    yield store
    store.close()


def pool_of(store: TierStore) -> torch.Tensor:
    return store._pool.view(torch.float32).view(SHAPE)


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


def test_rates_are_measured(store: TierStore) -> None:
    rates = store.measure([0, 1, 2])
    assert set(rates) == {Tier.HOST, Tier.DISK}
    assert min(rates.values()) > 0
