"""What a subscriber of the index is told, in which order, and what becomes of one that is slow."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from baton.kv.events import Event, Removed, Stored, Verdict, WorkerEvents
from baton.kv.index import PrefixIndex
from baton.rpc.kvstore_messages import decode_events, encode_events
from baton.rpc.v1 import kvstore_pb2, worker_pb2
from services.kvstore.feeds import IndexFeed, MembershipFeed, TooSlow
from services.kvstore.memory import MemoryBackend
from services.kvstore.state import ClusterState, Session

WORKERS = "abc"
BLOCKS = [bytes([number]) * 16 for number in range(5)]


def update(worker_id: str = "a") -> kvstore_pb2.IndexUpdate:
    return kvstore_pb2.IndexUpdate(events=kvstore_pb2.IndexEvents(worker_id=worker_id))


@pytest.mark.parametrize(("messages", "blocks"), [(3, 0), (1, 11)])
async def test_a_feed_holds_so_much_and_then_ends(messages: int, blocks: int) -> None:
    feed = IndexFeed(max_messages=2, max_blocks=10)
    feed.offer(update(), 10)
    assert feed.next_now() == update()
    for _ in range(messages):
        feed.offer(update(), blocks)
    feed.offer(update(), 0)
    with pytest.raises(TooSlow):
        await feed.next()
    with pytest.raises(TooSlow):
        feed.next_now()


def test_what_is_part_of_a_listing_to_come_does_not_wait() -> None:
    feed = IndexFeed("ab", max_messages=1)
    for _ in range(5):
        feed.offer(update("a"), 1)
        feed.offer(update("b"), 1)
    listed = feed.list_next()
    feed.offer(update("a"), 1)
    feed.offer(update("b"), 1)
    assert feed.next_now() == update(str(listed))
    assert feed.next_now() is None
    assert {listed, feed.list_next()} == {"a", "b"}
    assert feed.list_next() is None


async def test_a_watcher_that_does_not_read_costs_so_much_and_no_more() -> None:
    feed = MembershipFeed(max_changes=2)
    changes = [
        kvstore_pb2.RegistryUpdate.Change(worker=kvstore_pb2.Worker(worker_id=name)) for name in "abab"
    ]
    for change in changes:
        feed.offer(change)
    assert list((await feed.next()).changes) == changes[:2]
    for name in "abc":
        feed.offer(kvstore_pb2.RegistryUpdate.Change(worker=kvstore_pb2.Worker(worker_id=name)))
    with pytest.raises(TooSlow):
        await feed.next()


class SubscriberFollowsTheKvstore(RuleBasedStateMachine):
    """However slowly a subscriber is told, it never meets a gap, and in the end it knows what there is."""

    @initialize()
    def start(self) -> None:
        self.state = ClusterState(MemoryBackend())
        self.sessions: dict[str, Session] = {}
        self.sequences: dict[str, int] = {}
        self.incarnation = 0
        for worker_id in WORKERS:
            self.join(worker_id)
            self.publish(worker_id, [Stored(BLOCKS[:2])])
        self.subscribe()

    def subscribe(self) -> None:
        self.replica = PrefixIndex()
        self.subscription = self.state.subscribe()
        self.feed = self.subscription.__enter__()
        self.listing = self.state.listing(self.feed)
        self.pieces: list[kvstore_pb2.IndexUpdate] = []
        self.listed = False

    @rule()
    def subscribe_again(self) -> None:
        self.subscribe()

    def publish(self, worker_id: str, events: list[Event], snapshot: bool = False) -> None:
        self.sequences[worker_id] += 1
        first = self.sequences[worker_id] == 1
        message = WorkerEvents(
            worker_id,
            self.sessions[worker_id].incarnation,
            self.sequences[worker_id],
            first or snapshot,
            tuple(events),
        )
        verdict = self.state.publish(message, encode_events(message))
        assert verdict in (Verdict.APPLY, Verdict.REPLACE)

    def join(self, worker_id: str) -> None:
        self.incarnation += 1
        worker = kvstore_pb2.Worker(worker_id=worker_id, incarnation=str(self.incarnation))
        self.sessions[worker_id] = self.state.join(worker, worker_pb2.WorkerLoad(), False)
        self.sequences[worker_id] = 0

    @rule(worker_id=st.sampled_from(WORKERS), block=st.sampled_from(BLOCKS), stored=st.booleans())
    def step(self, worker_id: str, block: bytes, stored: bool) -> None:
        if worker_id in self.sessions:
            self.publish(worker_id, [Stored([block]) if stored else Removed([block])])

    @rule(worker_id=st.sampled_from(WORKERS), block=st.sampled_from(BLOCKS))
    def send_a_snapshot(self, worker_id: str, block: bytes) -> None:
        if worker_id in self.sessions:
            self.publish(worker_id, [Stored([block])], snapshot=True)

    @rule(worker_id=st.sampled_from(WORKERS))
    def leave_or_come_back(self, worker_id: str) -> None:
        session = self.sessions.pop(worker_id, None)
        if session is None:
            self.join(worker_id)
        else:
            self.state.leave(session)

    @rule(worker_id=st.sampled_from(WORKERS))
    def lose_the_connection(self, worker_id: str) -> None:
        """The same process joins again and has to send everything once more."""
        session = self.sessions.get(worker_id)
        if session is not None:
            self.state.leave(session)
            worker = kvstore_pb2.Worker(worker_id=worker_id, incarnation=session.incarnation)
            self.sessions[worker_id] = self.state.join(worker, worker_pb2.WorkerLoad(), False)
            self.publish(worker_id, [Stored(BLOCKS[:1])], snapshot=True)

    @rule(worker_id=st.sampled_from(WORKERS))
    def restart(self, worker_id: str) -> None:
        self.join(worker_id)

    @precondition(lambda self: not self.listed or self.pieces)
    @rule()
    def tell_a_piece(self) -> None:
        self.tell_one()

    @rule()
    def tell_what_waits(self) -> None:
        while self.tell_one():
            pass

    def tell_one(self) -> bool:
        """What the Subscribe call sends next; False when it has nothing to send."""
        if self.pieces:
            self.take(self.pieces.pop(0))
        elif (waiting := self.feed.next_now()) is not None:
            self.take(waiting)
        elif self.listed:
            return False
        else:
            pieces = next(self.listing, None)
            self.listed = pieces is None
            self.pieces = list(pieces or ())
        return True

    def take(self, told: kvstore_pb2.IndexUpdate) -> None:
        worker_id = told.events.worker_id
        if told.gone:
            if self.replica.incarnation(worker_id) == told.events.incarnation:
                self.replica.drop(worker_id)
        else:
            assert self.replica.apply(decode_events(told.events)) is not Verdict.RESYNC

    def teardown(self) -> None:
        self.tell_what_waits()
        for block in BLOCKS:
            truth = {
                member.worker_id
                for member in self.state.members
                if member.position is not None and block in member.holdings
            }
            assert set(self.replica.holders(block)) == truth


TestSubscriberFollowsTheKvstore = SubscriberFollowsTheKvstore.TestCase
TestSubscriberFollowsTheKvstore.settings = settings(max_examples=60, stateful_step_count=40)
