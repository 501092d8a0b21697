"""The blocks one worker holds: in which tiers each lies, and when it was last of use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from sys import getsizeof

from baton.kv.events import Cleared, Event, Stored, Tier

_ID_BYTES = 64  # a bytes object of 16 bytes, as the allocator rounds it
_SAMPLES = 1024
_MAX_SHARED = 4096

# An entry is the block's generation of last use, then the tiers it lies in as the sum of 1 << tier.
# Few distinct values cover millions of blocks; equal ones share one int object.
_GENERATION_SHIFT = 1 + max(Tier)
_TIERS = (1 << _GENERATION_SHIFT) - 1
_shared: dict[int, int] = {}


def _one(entry: int) -> int:
    if len(_shared) > _MAX_SHARED:
        _shared.clear()
    return _shared.setdefault(entry, entry)


class Holdings:
    """Blocks in the order they were first stored, each with the generation (`IndexBound`) of its last use."""

    def __init__(self, tiers: Mapping[bytes, int] | None = None) -> None:
        """`tiers`: block ids with the sum of `1 << tier`; they count as used in generation 0."""
        self._entries: dict[bytes, int] = dict(tiers or {})

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._entries

    @property
    def memory_bytes(self) -> int:
        """Memory that the blocks take."""
        return getsizeof(self._entries) + _ID_BYTES * len(self._entries)

    def ids(self) -> list[bytes]:
        """Every block id, first stored first."""
        return list(self._entries)

    def tiers(self, block_id: bytes) -> int:
        """The tiers that hold the block, as the sum of `1 << tier`; 0 is none."""
        return self._entries.get(block_id, 0) & _TIERS

    def by_tier(self) -> dict[Tier, list[bytes]]:
        """Every block id, once for each tier it lies in; tiers that hold nothing are left out."""
        found = {tier: [i for i, entry in self._entries.items() if entry & 1 << tier] for tier in Tier}
        return {tier: ids for tier, ids in found.items() if ids}

    def apply(self, event: Event, generation: int) -> Iterable[bytes]:
        """Take one event, of which what is stored is used in `generation`; returns the ids it touched."""
        entries = self._entries
        if isinstance(event, Stored):
            new = _one(generation << _GENERATION_SHIFT | 1 << event.tier)
            for block_id in event.block_ids:
                entry = entries.setdefault(block_id, new)
                if entry is not new:
                    entries[block_id] = _one(new | entry & _TIERS)
            return event.block_ids
        if isinstance(event, Cleared):
            ids: Sequence[bytes] = list(entries)
            gone = _TIERS if event.tier is None else 1 << event.tier
        else:
            ids, gone = event.block_ids, 1 << event.tier
        for block_id in ids:
            entry = entries.get(block_id, 0) & ~gone
            if entry & _TIERS:
                entries[block_id] = _one(entry)
            else:
                entries.pop(block_id, None)
        return ids

    def use(self, block_ids: Iterable[bytes], generation: int) -> int:
        """Note that a chain was of use in `generation`, as far as it is held; returns for how many blocks
        that is news."""
        entries, news = self._entries, 0
        for block_id in block_ids:
            entry = entries.get(block_id)
            if entry is None:
                break
            if entry >> _GENERATION_SHIFT < generation:
                entries[block_id] = _one(generation << _GENERATION_SHIFT | entry & _TIERS)
                news += 1
        return news

    def generations(self) -> Counter[int]:
        """How many blocks were last used in which generation, about: by a sample where there are many."""
        step = 1 + len(self._entries) // _SAMPLES
        sample = islice(self._entries.values(), 0, None, step)
        counts = Counter(entry >> _GENERATION_SHIFT for entry in sample)
        return Counter({generation: step * count for generation, count in counts.items()})

    def forget(self, generation: int) -> list[bytes]:
        """Let go of what was last used in `generation` or before; returns the ids."""
        last = (generation + 1) << _GENERATION_SHIFT
        gone = [block_id for block_id, entry in self._entries.items() if entry < last]
        if gone:  # a new dict, because one keeps the room it once had
            self._entries = {block_id: entry for block_id, entry in self._entries.items() if entry >= last}
        return gone
