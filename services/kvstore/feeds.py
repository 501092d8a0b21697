"""How changes reach subscribers that may be slow: bounded queues, one per open stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from baton.errors import Overloaded
from baton.rpc.v1 import kvstore_pb2

MAX_MESSAGES = 8192
MAX_BLOCKS = 1 << 20
MAX_CHANGES = 1 << 15


class TooSlow(Overloaded):
    """The subscriber fell too far behind; it must subscribe again and start from a snapshot."""

    def __init__(self) -> None:
        super().__init__("the subscriber read too slowly; subscribe again", retry_after_s=0.0)


class IndexFeed:
    """Index updates waiting for one subscriber, in order.

    Holds at most `max_messages` updates and `max_blocks` block ids; one more empties it and ends it.

    Args:
        unlisted: workers whose blocks the subscriber has yet to be told. What happens to them until
            `list_next` is part of that, and does not wait here.
    """

    def __init__(
        self,
        unlisted: Iterable[str] = (),
        max_messages: int = MAX_MESSAGES,
        max_blocks: int = MAX_BLOCKS,
    ) -> None:
        self._unlisted = dict.fromkeys(unlisted)
        self._max_messages = max_messages
        self._max_blocks = max_blocks
        self._waiting: deque[tuple[kvstore_pb2.IndexUpdate, int]] = deque()
        self._blocks = 0
        self._arrived = asyncio.Event()
        self._overflowed = False

    def list_next(self) -> str | None:
        """A worker whose blocks must be told before anything else is, or None when all have been."""
        return self._unlisted.popitem()[0] if self._unlisted else None

    def offer(self, update: kvstore_pb2.IndexUpdate, blocks: int) -> None:
        """Queue an update that carries `blocks` ids. Updates are shared between feeds: do not change them."""
        if self._overflowed or update.events.worker_id in self._unlisted:
            return
        self._waiting.append((update, blocks))
        self._blocks += blocks
        if len(self._waiting) > self._max_messages or self._blocks > self._max_blocks:
            self._overflowed = True
            self._waiting.clear()
        self._arrived.set()

    def next_now(self) -> kvstore_pb2.IndexUpdate | None:
        """The next update, None when there is none.

        Raises:
            TooSlow: the feed overflowed.
        """
        if self._overflowed:
            raise TooSlow
        if not self._waiting:
            return None
        update, blocks = self._waiting.popleft()
        self._blocks -= blocks
        return update

    async def next(self) -> kvstore_pb2.IndexUpdate:
        """The next update, waiting for one as long as it takes.

        Raises:
            TooSlow: the feed overflowed.
        """
        while (update := self.next_now()) is None:
            self._arrived.clear()
            await self._arrived.wait()
        return update


class MembershipFeed:
    """Changes of workers waiting for one watcher: the latest of each worker, `max_changes` at most."""

    def __init__(self, max_changes: int = MAX_CHANGES) -> None:
        self._max_changes = max_changes
        self._waiting: dict[str, kvstore_pb2.RegistryUpdate.Change] = {}
        self._arrived = asyncio.Event()
        self._overflowed = False

    def offer(self, change: kvstore_pb2.RegistryUpdate.Change) -> None:
        """Queue a change in place of an older one of the same worker."""
        if self._overflowed:
            return
        self._waiting[change.worker.worker_id] = change
        if len(self._waiting) > self._max_changes:
            self._overflowed = True
            self._waiting.clear()
        self._arrived.set()

    async def next(self) -> kvstore_pb2.RegistryUpdate:
        """Every change that waits, waiting for one as long as it takes.

        Raises:
            TooSlow: the feed overflowed.
        """
        while not self._waiting and not self._overflowed:
            self._arrived.clear()
            await self._arrived.wait()
        if self._overflowed:
            raise TooSlow
        changes, self._waiting = self._waiting, {}
        return kvstore_pb2.RegistryUpdate(changes=changes.values())
