"""The index replica against a plain model, under stores, evictions, restarts, lost events and resyncs."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.kv.events import (
    Cleared,
    Event,
    Position,
    Removed,
    Stored,
    Tier,
    Verdict,
    WorkerEvents,
    snapshot_pieces,
)
from baton.kv.index import PrefixIndex

WORKERS = ["a", "b", "c", "d"]


def block(*path: int) -> bytes:
    return bytes(path).rjust(16, b"\xff")


def chain(*path: int) -> list[bytes]:
    return [block(*path[: depth + 1]) for depth in range(len(path))]


class Model:
    """One worker as it really is: blocks by path in the tree of prompts, each in one or more tiers."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.sequence = 0
        self.held: dict[tuple[int, ...], set[Tier]] = {}

    def leaves(self) -> list[tuple[int, ...]]:
        return sorted(p for p in self.held if not any(q[: len(p)] == p and q != p for q in self.held))

    def ids(self, tier: Tier) -> list[bytes]:
        return [block(*path) for path, tiers in sorted(self.held.items()) if tier in tiers]

    def message(self, worker_id: str, *events: Event, snapshot: bool = False) -> WorkerEvents:
        self.sequence += 1
        return WorkerEvents(worker_id, str(self.incarnation), self.sequence, snapshot, events)

    def snapshot(self, worker_id: str) -> WorkerEvents:
        return self.message(worker_id, *(Stored(self.ids(tier), tier) for tier in Tier), snapshot=True)

    def leading(self, path: Sequence[int]) -> int:
        return next((n for n in range(len(path)) if tuple(path[: n + 1]) not in self.held), len(path))


paths = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
workers = st.sampled_from(WORKERS)
tiers = st.sampled_from(Tier)


class ReplicaFollowsWorkers(RuleBasedStateMachine):
    """A worker whose message was lost is out of step until its next message uncovers the gap."""

    @initialize()
    def start(self) -> None:
        self.index = PrefixIndex()
        self.model = {worker_id: Model() for worker_id in WORKERS}
        self.in_step: set[str] = set()

    def deliver(self, worker_id: str, message: WorkerEvents, lost: bool) -> None:
        if lost:
            self.in_step.discard(worker_id)
            return
        verdict = self.index.apply(message)
        assert (verdict is Verdict.RESYNC) == (worker_id not in self.in_step)
        if verdict is Verdict.RESYNC:
            assert self.index.apply(self.model[worker_id].snapshot(worker_id)) is Verdict.REPLACE
        self.in_step.add(worker_id)

    @rule(worker_id=workers, path=paths, tier=tiers, lost=st.booleans())
    def store(self, worker_id: str, path: tuple[int, ...], tier: Tier, lost: bool) -> None:
        model = self.model[worker_id]
        for depth in range(len(path)):
            model.held.setdefault(path[: depth + 1], set()).add(tier)
        self.deliver(worker_id, model.message(worker_id, Stored(chain(*path), tier)), lost)

    @rule(worker_id=workers, data=st.data(), lost=st.booleans())
    def evict_a_leaf(self, worker_id: str, data: st.DataObject, lost: bool) -> None:
        model = self.model[worker_id]
        if not model.held:
            return
        leaf = data.draw(st.sampled_from(model.leaves()))
        gone = model.held.pop(leaf)
        events = [Removed([block(*leaf)], tier) for tier in sorted(gone)]
        self.deliver(worker_id, model.message(worker_id, *events), lost)

    @rule(worker_id=workers, origin=tiers, destination=tiers, data=st.data())
    def move_between_tiers(
        self, worker_id: str, origin: Tier, destination: Tier, data: st.DataObject
    ) -> None:
        model = self.model[worker_id]
        here = sorted(path for path, held in model.held.items() if origin in held)
        if not here or origin is destination:
            return
        path = data.draw(st.sampled_from(here))
        model.held[path] = model.held[path] - {origin} | {destination}
        events = (Stored([block(*path)], destination), Removed([block(*path)], origin))
        self.deliver(worker_id, model.message(worker_id, *events), False)

    @rule(worker_id=workers, then=paths)
    def clear_all_and_store(self, worker_id: str, then: tuple[int, ...]) -> None:
        model = self.model[worker_id]
        model.held = {then[: depth + 1]: {Tier.DEVICE} for depth in range(len(then))}
        self.deliver(worker_id, model.message(worker_id, Cleared(), Stored(chain(*then))), False)

    @rule(worker_id=workers)
    def lose_everything_but_the_device(self, worker_id: str) -> None:
        model = self.model[worker_id]
        model.held = {path: {Tier.DEVICE} for path, held in model.held.items() if Tier.DEVICE in held}
        # Only what is closed under prefixes is left to a worker; the rest it gives up as well.
        orphans = [p for p in model.held if any(p[:n] not in model.held for n in range(1, len(p)))]
        for path in orphans:
            del model.held[path]
        events = (Cleared(Tier.HOST), Cleared(Tier.DISK), Removed([block(*p) for p in orphans]))
        self.deliver(worker_id, model.message(worker_id, *events), False)

    @rule(worker_id=workers)
    def restart(self, worker_id: str) -> None:
        model = self.model[worker_id]
        model.incarnation, model.sequence, model.held = model.incarnation + 1, 0, {}
        self.in_step.discard(worker_id)

    @rule(worker_id=workers)
    def go(self, worker_id: str) -> None:
        self.index.drop(worker_id)
        self.in_step.discard(worker_id)
        assert worker_id not in self.index.workers()
        assert all(worker_id not in self.index.lookup(chain(first)) for first in range(3))

    @rule(worker_id=workers)
    def deliver_again(self, worker_id: str) -> None:
        if worker_id in self.in_step:
            model = self.model[worker_id]
            again = WorkerEvents(worker_id, str(model.incarnation), model.sequence, False, (Cleared(),))
            assert self.index.apply(again) is Verdict.DUPLICATE

    @rule(path=paths)
    def look_up(self, path: tuple[int, ...]) -> None:
        found = self.index.lookup(chain(*path))
        assert 0 not in found.values()
        for worker_id in self.in_step:
            assert found.get(worker_id, 0) == self.model[worker_id].leading(path)

    @invariant()
    def every_block_is_held_where_it_lies(self) -> None:
        for worker_id in self.in_step:
            for path, held in self.model[worker_id].held.items():
                assert self.index.holders(block(*path))[worker_id] is min(held)

    def teardown(self) -> None:
        for worker_id in WORKERS:
            self.index.drop(worker_id)
        nobody = WorkerEvents("nobody", "1", 1, True, ())
        for _ in range(3):  # a round for what was being swept, one for what was dropped meanwhile
            self.index.apply(nobody)
        assert len(self.index) == 0


TestReplicaFollowsWorkers = ReplicaFollowsWorkers.TestCase
TestReplicaFollowsWorkers.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_lookup_over_a_long_chain_probes_few_blocks() -> None:
    ids = [number.to_bytes(16, "big") for number in range(255)]
    index = PrefixIndex()
    for worker_id, count in [("a", 255), ("b", 100), ("c", 99), ("d", 1)]:
        index.apply(WorkerEvents(worker_id, "1", 1, True, (Stored(ids[:count]),)))

    class Counting(Sequence[bytes]):
        probes = 0

        def __len__(self) -> int:
            return len(ids)

        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            self.probes += 1
            return ids[at]

    chain_of = Counting()
    assert index.lookup(chain_of) == {"a": 255, "b": 100, "c": 99, "d": 1}
    assert chain_of.probes < 40


def test_what_lookups_found_is_kept_while_somebody_wants_it() -> None:
    index = PrefixIndex()
    index.apply(WorkerEvents("a", "1", 1, True, (Stored(chain(1, 2)),)))
    index.lookup(chain(1))
    index.keep_found = True
    for asked in (chain(1, 2, 0), chain(2), chain(1)):
        index.lookup_tiers(asked)
    assert index.take_found() == [chain(1, 2, 0), chain(1)]
    assert index.take_found() == []
    long = [*chain(1), *([bytes(16)] * 40_000)]
    for _ in range(3):
        index.lookup(long)
    assert index.take_found() == [long], "no more than is sent at once"
    for _ in range(2000):
        index.lookup(chain(1))
    assert len(index.take_found()) == 1024


def test_a_worker_that_left_takes_its_entries_with_it_while_others_go_on() -> None:
    index = PrefixIndex()
    ids = [number.to_bytes(16, "big") for number in range(20_000)]
    index.apply(WorkerEvents("a", "1", 1, True, (Stored(ids),)))
    index.apply(WorkerEvents("b", "1", 1, True, (Stored(ids[:10]),)))
    index.drop("a")
    assert index.lookup(ids[:100]) == {"b": 10}
    for sequence in range(2, 30):
        index.apply(WorkerEvents("b", "1", sequence, False, ()))
    assert len(index) == 10


def test_snapshot_pieces_end_at_the_position_and_rebuild_the_worker() -> None:
    device = [number.to_bytes(16, "big") for number in range(25)]
    held = {Tier.DEVICE: device, Tier.HOST: device[:7]}
    pieces = snapshot_pieces("a", Position("7", 4), held, max_blocks=10)
    assert [piece.sequence for piece in pieces] == [1, 2, 3, 4]
    assert [piece.snapshot for piece in pieces] == [True, False, False, False]
    assert all(piece.blocks() <= 10 for piece in pieces)
    index = PrefixIndex()
    assert [index.apply(piece) for piece in pieces] == [Verdict.REPLACE] + [Verdict.APPLY] * 3
    assert index.lookup(device) == {"a": 25}
    assert index.apply(WorkerEvents("a", "7", 5, False, (Cleared(Tier.DEVICE),))) is Verdict.APPLY
    assert index.lookup(device) == {"a": 7}
