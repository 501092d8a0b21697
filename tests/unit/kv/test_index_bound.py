"""The index replica when it may not keep everything: its bound, what goes first, what stays whole."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from baton.kv.events import Removed, Stored, Tier, TierCounts, WorkerEvents
from baton.kv.hashing import extend_chain
from baton.kv.index import PrefixIndex

BOUND = 300_000
SEGMENT = 16
HOT = (0, 0, 0)


def chain(path: tuple[int, ...]) -> list[bytes]:
    """A prompt of `SEGMENT` blocks for every number of the path; paths with a common start share blocks."""
    return extend_chain(b"\0" * 16, [number for number in path for _ in range(SEGMENT)], 1)


class Workers:
    """What some workers truly hold, told to an index as it happens."""

    def __init__(self, index: PrefixIndex, seed: int) -> None:
        self.index = index
        self.random = random.Random(seed)
        self.held: dict[str, dict[bytes, None]] = {name: {} for name in "abc"}
        self._sequence = dict.fromkeys(self.held, 0)
        for name in self.held:
            self.tell(name)

    def tell(self, name: str, *events: Stored | Removed) -> None:
        self._sequence[name] += 1
        first = self._sequence[name] == 1
        self.index.apply(WorkerEvents(name, "1", self._sequence[name], first, events))
        assert self.index.memory_bytes <= BOUND

    def store(self, name: str, path: tuple[int, ...]) -> None:
        ids = chain(path)
        self.held[name].update(dict.fromkeys(ids))
        self.tell(name, Stored(ids, self.random.choice([Tier.DEVICE, Tier.DEVICE, Tier.HOST])))

    def truth(self, ids: list[bytes]) -> dict[str, int]:
        held = {name: sum(block_id in blocks for block_id in ids) for name, blocks in self.held.items()}
        return {name: count for name, count in held.items() if count}


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 1 << 32))
def test_memory_is_bounded_chains_stay_whole_and_those_in_use_stay(seed: int) -> None:
    workers = Workers(index := PrefixIndex(BOUND), seed)
    workers.store("a", HOT)
    paths = [HOT]
    for step in range(200):
        path = tuple(workers.random.randrange(6) for _ in range(workers.random.randint(1, 6)))
        paths.append(path)
        workers.store(workers.random.choice("abc"), path)
        assert index.lookup(chain(HOT)).get("a") == len(chain(HOT))
        if step % 50 == 49:
            for known in workers.random.sample(paths, 40):
                ids = chain(known)
                found, truth = index.lookup(ids), workers.truth(ids)
                assert all(count <= truth[name] for name, count in found.items())
                holders = [index.holders(block_id) for block_id in ids]
                for name in workers.held:
                    kept = [name in those for those in holders]
                    assert kept == sorted(kept, reverse=True), "a block is kept and one before it is not"
    assert index.evicted > 0


def test_without_pressure_the_bound_changes_nothing() -> None:
    workers = Workers(index := PrefixIndex(BOUND), 1)
    for number in range(10):
        workers.store("b", (number, 1))
        assert index.lookup(chain((number, 1))) == {"b": 2 * SEGMENT}
    assert index.evicted == 0


@pytest.mark.parametrize("again", [False, True])
def test_what_was_given_up_is_found_once_it_is_stored_again(again: bool) -> None:
    workers = Workers(index := PrefixIndex(BOUND), 1)
    workers.store("a", (7, 7))
    number = 100
    while index.holders(chain((7, 7))[0]):
        number += 1
        workers.store("b", (number,))
    if again:
        workers.store("a", (7, 7))
    assert index.lookup(chain((7, 7))) == ({"a": 2 * SEGMENT} if again else {})


def test_leading_blocks_are_counted_by_the_tier_they_are_reached_in() -> None:
    ids = chain((1, 2, 3, 4))
    index = PrefixIndex()
    index.apply(WorkerEvents("a", "1", 1, True, (Stored(ids[:20]),)))
    assert index.lookup_tiers(ids) == {"a": TierCounts(device=20)}
    index.apply(
        WorkerEvents(
            "b", "1", 1, True, (Stored(ids[:10]), Stored(ids[5:30], Tier.HOST), Stored(ids[:64], Tier.DISK))
        )
    )
    index.apply(WorkerEvents("c", "1", 1, True, (Stored(ids[:3], Tier.DISK),)))
    assert index.lookup_tiers(ids) == {
        "a": TierCounts(device=20),
        "b": TierCounts(device=10, host=20, disk=34),
        "c": TierCounts(disk=3),
    }
    assert index.lookup_tiers(ids)["b"].total == index.lookup(ids)["b"] == 64
    index.apply(WorkerEvents("b", "1", 2, False, (Removed(ids[30:], Tier.DISK), Removed(ids[2:10]))))
    assert index.lookup_tiers(ids)["b"] == TierCounts(device=2, host=28)
