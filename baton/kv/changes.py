"""What happened to the blocks of a worker since the index was last told, and no more than that."""

from __future__ import annotations

from baton.kv.events import Event, Removed, Stored, Tier


class Changes:
    """Gathers stored and removed blocks; what was undone in between is not told at all."""

    def __init__(self) -> None:
        self._stored: dict[Tier, dict[bytes, None]] = {tier: {} for tier in Tier}
        self._removed: dict[Tier, dict[bytes, None]] = {tier: {} for tier in Tier}

    def stored(self, tier: Tier, block_id: bytes) -> None:
        """The block, which was not in `tier`, now is."""
        self._note(self._stored[tier], self._removed[tier], block_id)

    def removed(self, tier: Tier, block_id: bytes) -> None:
        """The block, which was in `tier`, no longer is."""
        self._note(self._removed[tier], self._stored[tier], block_id)

    def take(self) -> list[Event]:
        """At most one event per kind and tier; a block that moved is stored before it is removed.

        Blocks reach the device parents first and come down children first; both are told parents first.
        """
        events: list[Event] = []
        for tier, stored in self._stored.items():
            if stored:
                events.append(Stored(tuple(stored if tier is Tier.DEVICE else reversed(stored)), tier))
                stored.clear()
        for tier, removed in self._removed.items():
            if removed:
                events.append(Removed(tuple(removed), tier))
                removed.clear()
        return events

    @staticmethod
    def _note(now: dict[bytes, None], opposite: dict[bytes, None], block_id: bytes) -> None:
        if block_id in opposite:
            del opposite[block_id]
        else:
            now[block_id] = None
