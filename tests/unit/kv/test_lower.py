"""Whatever moves between device, host and disk, a block read back is the block that was stored."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.kv.events import Cleared, Removed, Stored, Tier
from baton.kv.hashing import extend_chain
from baton.kv.lower import Held, LowerTiers, Spill
from baton.kv.pool import BlockPool, NoFreeBlocks

DEVICE, HOST, DISK = 8, 5, 7


def chain_of(tokens: list[int]) -> list[bytes]:
    return extend_chain(bytes(16), tokens, 1)


@dataclass
class Running:
    """A prompt of one-token blocks; `held` are its blocks that are still to be brought up."""

    chain: list[bytes]
    blocks: list[int]
    start: int
    held: list[Held]


class TiersMachine(RuleBasedStateMachine):
    """Random prompts; the threads' jobs run whenever hypothesis wants them to, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.device: dict[int, bytes] = {}
        self.slots: dict[Tier, dict[int, bytes]] = {Tier.HOST: {}, Tier.DISK: {}}
        self.lower = LowerTiers(HOST, DISK, self)
        self.pool = BlockPool(DEVICE)
        self.pool.put_below(self.lower)
        self.loads: list[Running] = []
        self.spills: list[Spill] = []
        self.running: list[Running] = []
        self.parents: dict[bytes, bytes | None] = {}
        self.replica: dict[Tier, set[bytes]] = {tier: set() for tier in Tier}

    # The sink.

    def copy_down(self, block: int, host_slot: int) -> None:
        self.slots[Tier.HOST][host_slot] = self.device[block]

    def settle(self) -> None: ...

    # What the engine does.

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def run(self, tokens: list[int]) -> None:
        chain = chain_of(tokens)
        self.parents.update(zip(chain, [None, *chain], strict=False))
        start = self.pool.match(chain)
        below = self.pool.match_below(chain, start)
        blocks = self.pool.acquire(chain[:start])
        held = self.pool.hold_below(chain[start : start + below])
        try:
            blocks += self.pool.allocate(len(chain) - start)
        except NoFreeBlocks:
            self.pool.let_go(held)
            self.pool.release(blocks)
            return
        for block in blocks[start:]:
            self.device[block] = b"being written"
        running = Running(chain, blocks, start, held)
        if held:
            self.loads.append(running)
        else:
            self.compute(running, start)
        self.spills += self.lower.spills()

    def compute(self, running: Running, start: int) -> None:
        for index in range(start, len(running.chain)):
            self.device[running.blocks[index]] = running.chain[index]
            self.share(running, index)
        self.running.append(running)

    def share(self, running: Running, index: int) -> None:
        parent = running.chain[index - 1] if index else None
        running.blocks[index] = self.pool.share(running.blocks[index], running.chain[index], parent)

    @precondition(lambda self: self.loads)
    @rule()
    def load(self) -> None:
        running = self.loads.pop(0)
        good = True
        at = running.start
        lost = []
        for held in running.held:
            content = self.slots[held.tier][held.slot]
            assert content == held.block_id or held.tier is Tier.DISK
            good = good and content == held.block_id
            if good:
                self.device[running.blocks[at]] = content
                self.share(running, at)
                at += 1
            else:
                lost.append(held)
        for held in running.held:
            if held in lost:
                self.pool.lose(held)
            else:
                self.pool.let_go([held])
        self.compute(running, at)
        self.spills += self.lower.spills()

    @precondition(lambda self: self.spills)
    @rule(ok=st.booleans() | st.just(True))
    def spill(self, ok: bool) -> None:
        spill = self.spills.pop(0)
        content = self.slots[Tier.HOST][spill.held.slot]
        assert content == spill.held.block_id
        if ok:
            self.slots[Tier.DISK][spill.disk_slot] = content
        self.lower.spilled(spill, ok=ok)
        self.spills += self.lower.spills()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        release = self.pool.release_copies if data.draw(st.booleans()) else self.pool.release
        release(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))).blocks)

    @precondition(lambda self: self.slots[Tier.DISK])
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        self.slots[Tier.DISK][data.draw(st.sampled_from(sorted(self.slots[Tier.DISK])))] = b"corrupt"

    def finish_all(self) -> None:
        for running in self.running:
            self.pool.release(running.blocks)
        self.running.clear()

    # What must hold.

    @invariant()
    def blocks_in_use_are_what_they_are_called(self) -> None:
        for running in self.running:
            assert [self.device[block] for block in running.blocks] == running.chain

    @invariant()
    def every_block_is_in_one_tier_after_all_before_it(self) -> None:
        held = self.pool.held_ids()
        everywhere = set().union(*held.values())
        assert len(everywhere) == sum(map(len, held.values()))
        for block_id in everywhere:
            parent = self.parents[block_id]
            assert parent is None or parent in everywhere
        assert self.lower.count(Tier.HOST) <= HOST
        assert self.lower.count(Tier.DISK) <= DISK

    @invariant()
    def events_describe_the_tiers(self) -> None:
        for event in self.pool.take_events():
            assert not isinstance(event, Cleared)
            here = self.replica[event.tier]
            if isinstance(event, Stored):
                assert here.isdisjoint(event.block_ids)
                here.update(event.block_ids)
            elif isinstance(event, Removed):
                assert here.issuperset(event.block_ids)
                here.difference_update(event.block_ids)
        assert self.replica == {tier: set(ids) for tier, ids in self.pool.held_ids().items()}

    def teardown(self) -> None:
        while self.loads:
            self.load()
        while self.spills:
            self.spill(True)
        self.finish_all()
        assert self.pool.available == DEVICE
        for tier, slots in ((Tier.HOST, HOST), (Tier.DISK, DISK)):
            assert self.lower.count(tier) + len(self.lower._free[tier]) == slots


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(max_examples=150, stateful_step_count=50)


def test_a_prefix_that_went_down_comes_back_from_host_and_disk() -> None:
    machine = TiersMachine()
    for tokens in ([0] * 4, *([number] for number in range(1, 12))):
        machine.run(tokens)
        machine.finish_all()
        while machine.spills:
            machine.spill(True)
    assert machine.lower.count(Tier.HOST) > 0
    assert machine.lower.count(Tier.DISK) > 0
    machine.run([0] * 4)
    [load] = machine.loads
    assert {held.tier for held in load.held} == {Tier.HOST, Tier.DISK}
    machine.load()
    machine.blocks_in_use_are_what_they_are_called()
    machine.every_block_is_in_one_tier_after_all_before_it()
    machine.finish_all()
    machine.teardown()
