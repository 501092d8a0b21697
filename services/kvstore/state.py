"""What the kvstore knows: the live workers, the blocks each holds, and who wants to hear of changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import grpc

from baton.errors import BatonError, Overloaded
from baton.kv.events import SequenceGate, Stored, Verdict, WorkerEvents, snapshot_pieces
from baton.rpc.kvstore_messages import MAX_BLOCKS, encode_events
from baton.rpc.v1 import kvstore_pb2, worker_pb2
from services.kvstore.backend import Backend
from services.kvstore.bound import IndexBound
from services.kvstore.feeds import IndexFeed, MembershipFeed
from services.kvstore.holdings import Holdings
from services.kvstore.member import Member

log = logging.getLogger(__name__)

MAX_WORKERS = 10_000
_REMEMBERED_INCARNATIONS = 16
_REPORT_FOUND = kvstore_pb2.IndexUpdate(report_found=True)


class NotJoined(BatonError):
    """Events came from a worker that is not in the registry."""

    grpc_code = grpc.StatusCode.FAILED_PRECONDITION


class Replaced(BatonError):
    """A later process has taken the worker's id."""

    grpc_code = grpc.StatusCode.ALREADY_EXISTS


def _taken(worker_id: str) -> Replaced:
    return Replaced(f"worker id {worker_id} has been taken by a later process; give each its own --worker-id")


class Session:
    """One worker's hold on its place in the registry: the life of one Join stream."""

    def __init__(self, worker_id: str, incarnation: str) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation


class ClusterState:
    """Members and feeds. No sockets and no clocks; one task at a time may call it, no method waits.

    Args:
        index_max_bytes: memory that the workers' blocks may take; 0 is no bound (see `IndexBound`).
            Subscribers are not told of what is forgotten: what they know is true, and they have
            bounds of their own.
    """

    def __init__(self, backend: Backend, index_max_bytes: int = 0) -> None:
        self._backend = backend
        self._members: dict[str, Member] = {}
        self._sessions: dict[str, Session] = {}
        self._former: dict[str, list[str]] = {}
        self._gate = SequenceGate()
        self._index_feeds: set[IndexFeed] = set()
        self._membership_feeds: set[MembershipFeed] = set()
        self._closing = False
        self._index_max_bytes = index_max_bytes
        self._bound = IndexBound(index_max_bytes)
        self._asked_for_found = False

    @property
    def index_bytes(self) -> int:
        """Memory that the workers' blocks take."""
        return self._bound.bytes

    @property
    def forgotten_blocks(self) -> int:
        """Entries forgotten because the index was full."""
        return self._bound.forgotten

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    @property
    def subscribers(self) -> int:
        return len(self._index_feeds)

    # ---- workers ------------------------------------------------------------------------------

    def restore(self, members: Iterable[Member]) -> None:
        """Start from what an earlier process knew."""
        for member in members:
            self._members[member.worker_id] = member
            if member.position is not None:
                self._gate.restore(member.worker_id, member.position)
            ids = member.holdings.ids()
            member.holdings.use(ids, self._bound.generation)
            self._bound.stored(member.holdings, ids)
            self._keep_bound(member)

    def expire_unconfirmed(self) -> None:
        """Drop the members from `restore` that have not joined since."""
        for member in self.members:
            if not member.confirmed:
                log.warning("worker %s did not come back and is gone", member.worker_id)
                self._drop(member)
                self._former.pop(member.worker_id, None)

    def join(self, worker: kvstore_pb2.Worker, load: worker_pb2.WorkerLoad, draining: bool) -> Session:
        """Take a worker in. A later incarnation replaces the one there is, blocks included.

        Raises:
            Replaced: this incarnation is the one that was replaced.
            Overloaded: there are too many workers.
        """
        worker_id, incarnation = worker.worker_id, worker.incarnation
        if incarnation in self._former.get(worker_id, ()):
            raise _taken(worker_id)
        member = self._members.get(worker_id)
        if member is not None and member.incarnation != incarnation:
            log.info("worker %s was started anew", worker_id)
            former = self._former.setdefault(worker_id, [])
            former.append(member.incarnation)
            del former[:-_REMEMBERED_INCARNATIONS]
            self._drop(member)
            member = None
        if member is None:
            if len(self._members) >= MAX_WORKERS:
                raise Overloaded(f"the registry is full with {MAX_WORKERS} workers", retry_after_s=60.0)
            member = self._members[worker_id] = Member(worker, load, draining)
            log.info("worker %s joined from %s", worker_id, worker.address)
        member.confirmed = True
        session = self._sessions[worker_id] = Session(worker_id, incarnation)
        self._update(member, worker, load, draining)
        return session

    def beat(self, session: Session, beat: kvstore_pb2.Beat) -> None:
        """Take a sign of life and what is new with the worker.

        Raises:
            Replaced: the session's place was taken by another stream.
        """
        if self._sessions.get(session.worker_id) is not session:
            if session.incarnation in self._former.get(session.worker_id, ()):
                raise _taken(session.worker_id)
            raise Replaced(f"worker {session.worker_id} has joined on another stream")
        member = self._members[session.worker_id]
        worker = beat.worker if beat.HasField("worker") else member.worker
        if (worker.worker_id, worker.incarnation) != (session.worker_id, session.incarnation):
            raise Replaced(f"the stream of worker {session.worker_id} may not speak for {worker.worker_id}")
        load = beat.load if beat.HasField("load") else member.load
        member.read_bytes_per_s = dict(beat.read_bytes_per_s)
        self._update(member, worker, load, beat.draining)

    def leave(self, session: Session) -> None:
        """End a session: its worker is gone, unless it has joined again or the kvstore itself is going."""
        if not self._closing and self._sessions.get(session.worker_id) is session:
            member = self._members[session.worker_id]
            log.info("worker %s is gone", session.worker_id)
            self._drop(member)
            self._former.pop(session.worker_id, None)

    def close(self) -> None:
        """From now on streams end because the kvstore stops, which says nothing about the workers."""
        self._closing = True

    def _update(
        self,
        member: Member,
        worker: kvstore_pb2.Worker,
        load: worker_pb2.WorkerLoad,
        draining: bool,
    ) -> None:
        member.worker, member.load, member.draining = worker, load, draining
        self._backend.member_changed(member)
        for feed in self._membership_feeds:
            feed.offer(member.change())

    def _drop(self, member: Member) -> None:
        worker_id = member.worker_id
        del self._members[worker_id]
        self._sessions.pop(worker_id, None)
        self._gate.forget(worker_id)
        self._bound.drop(worker_id)
        self._backend.member_gone(member)
        for membership_feed in self._membership_feeds:
            membership_feed.offer(member.change(gone=True))
        gone = kvstore_pb2.IndexUpdate(
            gone=True,
            events=kvstore_pb2.IndexEvents(worker_id=worker_id, incarnation=member.incarnation),
        )
        for index_feed in self._index_feeds:
            index_feed.offer(gone, 0)

    # ---- blocks -------------------------------------------------------------------------------

    def publish(self, message: WorkerEvents, wire: kvstore_pb2.IndexEvents) -> Verdict:
        """Take a worker's events, given as values and as they came.

        Raises:
            NotJoined: the worker, or this incarnation of it, is not in the registry.
        """
        member = self._members.get(message.worker_id)
        if member is None or member.incarnation != message.incarnation:
            raise NotJoined(f"worker {message.worker_id} must join the registry before it publishes")
        verdict = self._gate.admit(message)
        if verdict in (Verdict.APPLY, Verdict.REPLACE):
            member.position = self._gate.position(message.worker_id)
            if verdict is Verdict.REPLACE:
                member.holdings = Holdings()
            touched = []
            for event in message.events:
                touched.append(member.holdings.apply(event, self._bound.generation))
                if isinstance(event, Stored):
                    self._bound.stored(member.holdings, event.block_ids)
            if verdict is Verdict.REPLACE:
                self._backend.blocks_replaced(member)
            else:
                self._backend.blocks_changed(member, (block_id for ids in touched for block_id in ids))
            self._keep_bound(member, message.blocks())
            update = kvstore_pb2.IndexUpdate(events=wire)
            for feed in self._index_feeds:
                feed.offer(update, message.blocks())
        return verdict

    def use(self, chains: Sequence[Sequence[bytes]]) -> None:
        """A router has looked these chains up."""
        self._bound.use(chains)

    def _keep_bound(self, member: Member, stored: int = 0) -> None:
        """Account for the member's blocks, and forget some of somebody's when all are too many."""
        self._bound.weigh(member.worker_id, member.holdings)
        if self._bound.pressed and not self._asked_for_found:
            self._asked_for_found = True
            for feed in self._index_feeds:
                feed.offer(_REPORT_FOUND, 0)
        first = not self._bound.forgotten
        for worker_id, gone in self._bound.forget(stored):
            self._backend.blocks_changed(self._members[worker_id], gone)
        if first and self._bound.forgotten:
            log.warning(
                "the index has reached --index-max-bytes %d and forgets what was used least recently; "
                "raise it if there is memory",
                self._index_max_bytes,
            )

    # ---- feeds --------------------------------------------------------------------------------

    @contextmanager
    def watch(self) -> Iterator[MembershipFeed]:
        """A feed of every change of membership from now on."""
        feed = MembershipFeed()
        self._membership_feeds.add(feed)
        try:
            yield feed
        finally:
            self._membership_feeds.remove(feed)

    def membership(self) -> kvstore_pb2.RegistryUpdate:
        """Every worker there is."""
        return kvstore_pb2.RegistryUpdate(snapshot=True, changes=[m.change() for m in self.members])

    @contextmanager
    def subscribe(self) -> Iterator[IndexFeed]:
        """A feed of every index update from now on, for a subscriber that is told the rest by `listing`."""
        feed = IndexFeed(self._members)
        if self._asked_for_found:
            feed.offer(_REPORT_FOUND, 0)
        self._index_feeds.add(feed)
        try:
            yield feed
        finally:
            self._index_feeds.remove(feed)

    def listing(self, feed: IndexFeed) -> Iterator[Iterator[kvstore_pb2.IndexUpdate]]:
        """What every worker holds, a worker at a time.

        Each says what was when it was asked for: pass it on whole, and then what waits in the feed,
        before the next one.
        """
        while (worker_id := feed.list_next()) is not None:
            member = self._members.get(worker_id)
            if member is not None and member.position is not None:
                held = member.holdings.by_tier()
                pieces = snapshot_pieces(worker_id, member.position, held, MAX_BLOCKS)
                yield (kvstore_pb2.IndexUpdate(events=encode_events(piece)) for piece in pieces)
