"""The block pool keeps every block accounted for and evicts leaf first, whatever the order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.kv.events import Tier
from baton.kv.hashing import extend_chain
from baton.kv.pool import BlockPool, NoFreeBlocks

ROOT = bytes(16)


def chain_of(tokens: list[int]) -> list[bytes]:
    return extend_chain(ROOT, tokens, 1)


def write(pool: BlockPool, tokens: list[int]) -> list[int]:
    """What the engine does with a prompt of one-token blocks: reuse, allocate, share."""
    chain = chain_of(tokens)
    held = pool.match(chain)
    blocks = pool.acquire(chain[:held])
    try:
        blocks += pool.allocate(len(tokens) - held)
    except NoFreeBlocks:
        pool.release(blocks)
        raise
    for index in range(held, len(tokens)):
        blocks[index] = pool.share(blocks[index], chain[index], chain[index - 1] if index else None)
    return blocks


def test_a_released_chain_is_found_again_and_costs_nothing() -> None:
    pool = BlockPool(8)
    first = write(pool, [1, 2, 3])
    pool.release(first)
    assert pool.available == 8
    assert write(pool, [1, 2, 3, 4])[:3] == first


def test_eviction_takes_the_least_recently_used_leaf() -> None:
    pool = BlockPool(4)
    pool.release(write(pool, [1, 2]))
    pool.release(write(pool, [7, 8]))
    pool.release(write(pool, [1]))
    pool.allocate(1)
    assert [pool.match(chain_of(tokens)) for tokens in ([1, 2], [7, 8])] == [1, 2]


def test_copies_go_before_what_was_used_longer_ago_unless_they_are_used_again() -> None:
    pool = BlockPool(4)
    pool.release(write(pool, [1, 2]))
    pool.release_copies(write(pool, [7, 8]))
    pool.release(pool.allocate(1))
    assert [pool.match(chain_of(tokens)) for tokens in ([1, 2], [7, 8])] == [2, 1]
    pool.release(write(pool, [7]))
    pool.release(pool.allocate(2))
    assert [pool.match(chain_of(tokens)) for tokens in ([1, 2], [7, 8])] == [1, 1]


def test_copies_stay_while_something_kept_lies_behind_them() -> None:
    pool = BlockPool(4)
    pool.release(write(pool, [1, 2, 3]))
    pool.release_copies(write(pool, [1, 2]))
    pool.allocate(2)
    assert pool.match(chain_of([1, 2, 3])) == 2


def test_sharing_what_another_block_already_holds_frees_the_copy() -> None:
    pool = BlockPool(4)
    chain = chain_of([5])
    one, two = pool.allocate(2)
    assert pool.share(one, chain[0], None) == one
    assert pool.share(two, chain[0], None) == one
    assert pool.available == 3
    pool.release([one])
    assert pool.available == 3
    pool.release([one])
    assert pool.available == 4


def test_asking_for_too_much_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.release(write(pool, [1, 2]))
    held = write(pool, [1])
    with pytest.raises(NoFreeBlocks, match="3 KV blocks wanted, 2 of 3 available"):
        pool.allocate(3)
    assert pool.match(chain_of([1, 2])) == 2
    pool.release(held)


class PoolMachine(RuleBasedStateMachine):
    """Random prompts over a small alphabet, held and released in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.held: list[tuple[list[int], list[int]]] = []
        self.replica: set[bytes] = set()

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def run(self, tokens: list[int]) -> None:
        try:
            self.held.append((tokens, write(self.pool, tokens)))
        except NoFreeBlocks:
            assert self.pool.available < len(tokens)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        _, blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        release = self.pool.release_copies if data.draw(st.booleans()) else self.pool.release
        release(blocks)

    @rule(count=st.integers(1, 4))
    def use_privately(self, count: int) -> None:
        if count <= self.pool.available:
            self.pool.release(self.pool.allocate(count))

    @invariant()
    def every_block_has_one_place(self) -> None:
        held = {block for _, blocks in self.held for block in blocks}
        assert self.pool.pinned == len(held)

    @invariant()
    def held_chains_are_found_whole(self) -> None:
        for tokens, blocks in self.held:
            chain = chain_of(tokens)
            assert self.pool.match(chain) == len(chain)
            found = self.pool.acquire(chain)
            assert found == blocks
            self.pool.release(found)

    @invariant()
    def events_describe_the_tree(self) -> None:
        for event in self.pool.take_events():
            for block_id in event.block_ids:  # type: ignore[union-attr]
                if type(event).__name__ == "Stored":
                    assert block_id not in self.replica
                    self.replica.add(block_id)
                else:
                    self.replica.remove(block_id)
        assert self.replica == set(self.pool.held_ids()[Tier.DEVICE])
        seen: set[bytes] = set()
        for length in range(1, 7):
            seen.update(chain_of([0] * length))
        for length in range(6, 1, -1):  # prefix closure on one long chain
            chain = chain_of([0] * length)
            if chain[-1] in self.replica:
                assert set(chain) <= self.replica


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)
