"""A full index of many workers: it stays within its bound and forgets what was of use longest ago."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from baton.kv.events import Cleared, Removed, Stored, Tier
from baton.kv.hashing import extend_chain
from services.kvstore.bound import IndexBound
from services.kvstore.holdings import Holdings

BOUND = 300_000
SEGMENT = 16


def chain(*path: int) -> list[bytes]:
    """A prompt of `SEGMENT` blocks for every number of the path; paths with a common start share blocks."""
    return extend_chain(bytes(16), [number for number in path for _ in range(SEGMENT)], 1)


class Index:
    """Some workers' holdings under one bound, used as the kvstore uses them."""

    def __init__(self, workers: str, max_bytes: int = BOUND) -> None:
        self.bound = IndexBound(max_bytes)
        self.held = {name: Holdings() for name in workers}
        self.gone: dict[str, set[bytes]] = {name: set() for name in workers}
        self.swept: list[int] = []
        for name, holdings in self.held.items():
            self.bound.weigh(name, holdings)

    def store(self, name: str, ids: list[bytes], tier: Tier = Tier.DEVICE) -> None:
        holdings = self.held[name]
        holdings.apply(Stored(ids, tier), self.bound.generation)
        self.gone[name].difference_update(ids)
        self.bound.stored(holdings, ids)
        self.bound.weigh(name, holdings)
        self.swept.append(0)
        for worker_id, gone in self.bound.forget(len(ids)):
            self.gone[worker_id].update(gone)
            self.swept[-1] += 1

    def look_up(self, ids: list[bytes]) -> None:
        self.bound.use([ids])


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 1 << 32))
def test_memory_is_bounded_chains_stay_whole_and_those_in_use_stay(seed: int) -> None:
    """Prompts come as they do: found in part by a router, then stored as a whole by the worker it chose."""
    rng = random.Random(seed)
    index = Index("abc")
    stored: dict[str, set[bytes]] = {name: set() for name in "abc"}
    paths = [(0, 0, 0)]
    for _ in range(400):
        path = tuple(rng.randrange(6) for _ in range(rng.randint(1, 6)))
        paths.append(path)
        for name, asked in (("a", paths[0]), (rng.choice("abc"), path)):
            index.look_up(chain(*asked))
            index.store(name, chain(*asked))
            stored[name].update(chain(*asked))
        assert index.bound.bytes == sum(holdings.memory_bytes for holdings in index.held.values())
        assert index.bound.bytes <= BOUND
        assert all(block_id in index.held["a"] for block_id in chain(*paths[0]))
    assert index.bound.forgotten > 0
    for name, holdings in index.held.items():
        assert set(holdings.ids()) == stored[name] - index.gone[name]
        for path in paths:
            kept = [block_id in holdings for block_id in chain(*path)]
            assert kept == sorted(kept, reverse=True), "a block is kept and one before it is not"


def test_what_was_used_longest_ago_goes_first_whoever_holds_it() -> None:
    index = Index("ab")
    index.store("a", chain(1))
    index.store("b", chain(2))
    number = 10
    while index.bound.forgotten == 0:
        index.look_up(chain(2))  # b holds little, and of use; a holds most, of none
        index.store("a", chain(number))
        number += 1
    assert chain(1)[0] not in index.held["a"]
    assert chain(number - 1)[0] in index.held["a"]
    assert chain(2)[0] in index.held["b"]
    while chain(2)[0] in index.held["b"]:  # now of no use either, and not kept for b's holding so little
        index.store("a", chain(number))
        number += 1
    assert chain(number - 1)[0] in index.held["a"]


def test_of_more_than_fits_at_once_the_beginnings_remain() -> None:
    index = Index("a")
    ids = chain(*range(500))
    index.store("a", ids)
    kept = len(index.held["a"])
    assert 1000 < kept < len(ids)
    assert index.held["a"].ids() == ids[:kept]
    assert index.bound.bytes <= BOUND


def test_workers_are_swept_a_few_at_a_time_while_there_is_room() -> None:
    index = Index("abcdefghijklmnop", max_bytes=4_000_000)
    for number in range(4000):
        index.store("abcdefghijklmnop"[number % 16], chain(number))
    assert index.bound.forgotten > 0
    assert max(index.swept) <= 2


def test_without_a_bound_nothing_is_forgotten() -> None:
    index = Index("a", max_bytes=0)
    for number in range(1000):
        index.store("a", chain(number))
    assert index.bound.forgotten == 0
    assert not index.bound.pressed


def test_a_worker_that_is_gone_weighs_nothing() -> None:
    index = Index("ab")
    index.store("a", chain(*range(100)))
    assert index.bound.pressed
    index.bound.drop("a")
    index.bound.drop("b")
    assert index.bound.bytes == 0
    assert not index.bound.pressed


tiers = st.sampled_from(Tier)
blocks = st.lists(st.integers(0, 9).map(lambda n: bytes([n]) * 16), max_size=6)
events = st.one_of(
    st.builds(Stored, blocks, tiers), st.builds(Removed, blocks, tiers), st.builds(Cleared, st.none() | tiers)
)


@given(st.lists(st.tuples(events, st.integers(0, 3)), max_size=20))
def test_holdings_are_what_the_events_say(history: list[tuple[Stored | Removed | Cleared, int]]) -> None:
    holdings, model = Holdings(), dict[bytes, set[Tier]]()
    generation = 0
    for event, later in history:
        generation += later
        holdings.apply(event, generation)
        if isinstance(event, Stored):
            for block_id in event.block_ids:
                model.setdefault(block_id, set()).add(event.tier)
        elif isinstance(event, Removed):
            for block_id in event.block_ids:
                model.get(block_id, set()).discard(event.tier)
        else:
            for held in model.values():
                held.difference_update(Tier if event.tier is None else {event.tier})
        model = {block_id: held for block_id, held in model.items() if held}
        assert holdings.ids() == list(model)
        assert {i: holdings.tiers(i) for i in model} == {i: sum(1 << t for t in model[i]) for i in model}
        assert holdings.by_tier() == {
            tier: ids for tier in Tier if (ids := [i for i, held in model.items() if tier in held])
        }
        assert sum(holdings.generations().values()) == len(model)


@pytest.mark.parametrize("many", [5, 5000])
def test_a_sample_counts_the_generations_of_many(many: int) -> None:
    holdings = Holdings({number.to_bytes(16, "big"): 2 for number in range(many)})
    assert holdings.generations()[0] == pytest.approx(many, rel=0.01)
