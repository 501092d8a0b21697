"""Which blocks lie below the device pool, in host memory or on disk, and which go when room is short.

A block is in one tier at a time: whatever uses it brings it up. Because the device evicts leaf first, a
block comes down after everything behind it in its chain: to drop first what came down first is to drop leaf
first, and what is held in all tiers together always begins at the start of a chain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from baton.kv.changes import Changes
from baton.kv.events import Tier

_FREE_SHARE = 8
"""With a disk below it, one host slot in so many is kept free by writing the oldest blocks to disk ahead
of time: coming down must never wait for a disk."""


class Sink(Protocol):
    """Who copies a block down, right before its place in the pool is used again."""

    def copy_down(self, block: int, host_slot: int) -> None:
        """Begin to copy pool block `block` to `host_slot`."""

    def settle(self) -> None:
        """Return when all copies are done."""


@dataclass(eq=False)
class Held:
    """A block's place below the device: `slot` of `tier`.

    `users` jobs are reading the slot; it is free once they are done and the block is no longer `here`.
    """

    block_id: bytes
    parent_id: bytes | None
    tier: Tier
    slot: int
    users: int = 0
    here: bool = True


@dataclass(frozen=True)
class Spill:
    """Write the held block, which is in host memory, to `disk_slot`; then call `LowerTiers.spilled`."""

    held: Held
    disk_slot: int


@dataclass
class LowerTiers:
    """The slots of the tiers below the device. Pure state; guarded by whoever guards the pool."""

    host_slots: int
    disk_slots: int
    sink: Sink
    changes: Changes = field(default_factory=Changes, init=False)
    _held: dict[bytes, Held] = field(default_factory=dict, init=False)
    _oldest_first: dict[Tier, OrderedDict[bytes, Held]] = field(init=False)
    _children: dict[bytes, set[bytes]] = field(default_factory=dict, init=False)
    _free: dict[Tier, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._oldest_first = {Tier.HOST: OrderedDict(), Tier.DISK: OrderedDict()}
        self._free = {
            Tier.HOST: list(range(self.host_slots - 1, -1, -1)),
            Tier.DISK: list(range(self.disk_slots - 1, -1, -1)),
        }

    def count(self, tier: Tier) -> int:
        """Blocks in `tier`."""
        return len(self._oldest_first[tier])

    def ids(self, tier: Tier) -> list[bytes]:
        """Blocks in `tier`, parents before children."""
        return list(reversed(self._oldest_first[tier]))

    def match(self, chain: Sequence[bytes], start: int) -> int:
        """How many blocks of `chain` from number `start` on are held in a row."""
        end = start
        while end < len(chain) and chain[end] in self._held:
            end += 1
        return end - start

    def take(self, block_id: bytes, parent_id: bytes | None, block: int) -> None:
        """The device evicts a block: copy it down if there is room or room can be made.

        If not, the blocks behind it in its chains are of no use any more and go, too.
        """
        slot = self._host_slot()
        if slot is None:
            self._drop_children(block_id)
            return
        self.sink.copy_down(block, slot)
        self._enter(Held(block_id, parent_id, Tier.HOST, slot))

    def supersede(self, block_id: bytes) -> None:
        """The device has the block now."""
        if block_id in self._held:
            self._leave(self._held[block_id])

    def hold(self, block_ids: Sequence[bytes]) -> list[Held]:
        """Keep the slots of blocks as they are, to read them, until `let_go`."""
        found = [self._held[block_id] for block_id in block_ids]
        for held in found:
            held.users += 1
        return found

    def let_go(self, held: Held, *, lost: bool = False) -> None:
        """A reader is done with the block. A `lost` one could not be read: it goes, with all behind it."""
        self._done_with(held)
        if lost and held.here:
            self._drop(held)

    def spills(self) -> list[Spill]:
        """What should be written to disk now, oldest first, so that host slots come free in time."""
        if not self.disk_slots:
            return []
        wanted = max(1, self.host_slots // _FREE_SHARE) - len(self._free[Tier.HOST])
        found: list[Spill] = []
        for held in list(islice(self._oldest_first[Tier.HOST].values(), max(0, wanted))):
            if held.here and not held.users and (slot := self._disk_slot()) is not None:
                held.users += 1
                found.append(Spill(held, slot))
        return found

    def spilled(self, spill: Spill, *, ok: bool) -> None:
        """The block was written, or could not be."""
        held = spill.held
        if not ok or not held.here or held.users > 1:  # gone meanwhile, or about to come up
            self._free[Tier.DISK].append(spill.disk_slot)
            self._done_with(held)
            if not ok and held.here:
                self._drop(held)
            return
        host_slot = held.slot
        self.changes.stored(Tier.DISK, held.block_id)
        self.changes.removed(Tier.HOST, held.block_id)
        del self._oldest_first[Tier.HOST][held.block_id]
        held.tier, held.slot, held.users = Tier.DISK, spill.disk_slot, 0
        self._oldest_first[Tier.DISK][held.block_id] = held
        self._free[Tier.HOST].append(host_slot)

    def _host_slot(self) -> int | None:
        if not self._free[Tier.HOST]:
            self._drop_oldest(Tier.HOST)
        return self._free[Tier.HOST].pop() if self._free[Tier.HOST] else None

    def _disk_slot(self) -> int | None:
        if not self._free[Tier.DISK]:
            self._drop_oldest(Tier.DISK)
        return self._free[Tier.DISK].pop() if self._free[Tier.DISK] else None

    def _drop_oldest(self, tier: Tier) -> None:
        for held in self._oldest_first[tier].values():
            if not held.users:
                self._drop(held)
                return

    def _drop(self, held: Held) -> None:
        """Forget a block and everything behind it, which cannot be used without it."""
        self._leave(held)
        self._drop_children(held.block_id)

    def _drop_children(self, block_id: bytes) -> None:
        for held in list(self._behind(block_id)):
            self._leave(held)

    def _behind(self, block_id: bytes) -> Iterator[Held]:
        found = [block_id]
        while found:
            for child in self._children.get(found.pop(), ()):
                yield self._held[child]
                found.append(child)

    def _enter(self, held: Held) -> None:
        self._held[held.block_id] = held
        self._oldest_first[held.tier][held.block_id] = held
        if held.parent_id is not None:
            self._children.setdefault(held.parent_id, set()).add(held.block_id)
        self.changes.stored(held.tier, held.block_id)

    def _leave(self, held: Held) -> None:
        held.here = False
        del self._held[held.block_id]
        del self._oldest_first[held.tier][held.block_id]
        if held.parent_id is not None:
            siblings = self._children[held.parent_id]
            siblings.remove(held.block_id)
            if not siblings:
                del self._children[held.parent_id]
        self.changes.removed(held.tier, held.block_id)
        if not held.users:
            self._free[held.tier].append(held.slot)

    def _done_with(self, held: Held) -> None:
        held.users -= 1
        if not held.users and not held.here:
            self._free[held.tier].append(held.slot)
