"""How changes reach subscribers that may be slow: bounded queues, one per open stream."""

from __future__ import annotations

import asyncio
from collections import deque

from baton.errors import Overloaded
from baton.rpc.v1 import kvstore_pb2

MAX_MESSAGES = 8192
MAX_BLOCKS = 1 << 20


class TooSlow(Overloaded):
    """The subscriber fell too far behind; it must subscribe again and start from a snapshot."""


class IndexFeed:
    """Index updates waiting for one subscriber, in order.

    Holds at most `max_messages` updates and `max_blocks` block ids; one more empties it and ends it.
    """

    def __init__(self, max_messages: int = MAX_MESSAGES, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_messages = max_messages
        self._max_blocks = max_blocks
        self._waiting: deque[tuple[kvstore_pb2.IndexUpdate, int]] = deque()
        self._blocks = 0
        self._arrived = asyncio.Event()
        self.overflowed = False

    def offer(self, update: kvstore_pb2.IndexUpdate, blocks: int) -> None:
        """Queue an update that carries `blocks` ids. Updates are shared between feeds: do not change them."""
        if self.overflowed:
            return
        self._waiting.append((update, blocks))
        self._blocks += blocks
        if len(self._waiting) > self._max_messages or self._blocks > self._max_blocks:
            self.overflowed = True
            self._waiting.clear()
        self._arrived.set()

    async def next(self) -> kvstore_pb2.IndexUpdate:
        """The next update, waiting for one as long as it takes.

        Raises:
            TooSlow: the feed overflowed.
        """
        while not self._waiting and not self.overflowed:
            self._arrived.clear()
            await self._arrived.wait()
        if self.overflowed:
            raise TooSlow("the subscriber read too slowly; subscribe again", retry_after_s=0.0)
        update, blocks = self._waiting.popleft()
        self._blocks -= blocks
        return update


class MembershipFeed:
    """Changes of workers waiting for one watcher: the latest of each worker, so never more than workers."""

    def __init__(self) -> None:
        self._waiting: dict[str, kvstore_pb2.RegistryUpdate.Change] = {}
        self._arrived = asyncio.Event()

    def offer(self, change: kvstore_pb2.RegistryUpdate.Change) -> None:
        """Queue a change in place of an older one of the same worker."""
        self._waiting[change.worker.worker_id] = change
        self._arrived.set()

    async def next(self) -> kvstore_pb2.RegistryUpdate:
        """Every change that waits, waiting for one as long as it takes."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        changes, self._waiting = self._waiting, {}
        return kvstore_pb2.RegistryUpdate(changes=changes.values())
