"""Where the kvstore's knowledge outlives the process: the interface its backends share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from services.kvstore.member import Member


class Backend(ABC):
    """Keeps a copy of what the kvstore knows.

    The kvstore answers from its memory and never waits for a backend: the methods that note a change
    return at once, and `run` carries the changes over. Members are read when they are carried over,
    so many changes of one member cost one write.
    """

    @abstractmethod
    async def load(self) -> Sequence[Member]:
        """What an earlier process kept, each member unconfirmed. Empty when that cannot be read now."""

    @abstractmethod
    async def run(self) -> None:
        """Carry changes over until cancelled; then try once more, briefly."""

    @abstractmethod
    def member_changed(self, member: Member) -> None:
        """The worker joined, changed or gave a sign of life."""

    @abstractmethod
    def blocks_changed(self, member: Member, block_ids: Iterable[bytes]) -> None:
        """The member's position moved on and these blocks of it changed."""

    @abstractmethod
    def blocks_replaced(self, member: Member) -> None:
        """The member's position and all of its blocks are new."""

    @abstractmethod
    def member_gone(self, member: Member) -> None:
        """Forget the worker and its blocks."""
