"""The backend of a kvstore that needs no Redis: nothing outlives the process.

After a restart the workers join again and send snapshots, so only a second or two of warmth is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from services.kvstore.backend import Backend
from services.kvstore.member import Member


class MemoryBackend(Backend):
    """Keeps nothing beyond the kvstore's own memory."""

    async def load(self) -> Sequence[Member]:
        return ()

    async def run(self) -> None:
        await asyncio.Event().wait()

    def member_changed(self, member: Member) -> None:
        pass

    def blocks_changed(self, member: Member, block_ids: Iterable[bytes]) -> None:
        pass

    def blocks_replaced(self, member: Member) -> None:
        pass

    def member_gone(self, member: Member) -> None:
        pass
