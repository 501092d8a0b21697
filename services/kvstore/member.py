"""What the kvstore keeps of one worker: who it is, how busy it is, and the blocks it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from sys import getsizeof

from baton.kv.events import Cleared, Event, Position, Stored, Tier
from baton.rpc.v1 import kvstore_pb2, worker_pb2

_ID_BYTES = 64  # a bytes object of 16 bytes, as the allocator rounds it


class Holdings:
    """The blocks of one worker and the tiers each lies in, in the order they were first stored."""

    def __init__(self, blocks: dict[bytes, int] | None = None) -> None:
        self._blocks = {} if blocks is None else blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def memory_bytes(self) -> int:
        """Memory that the blocks take."""
        return getsizeof(self._blocks) + _ID_BYTES * len(self._blocks)

    def forget_newest(self, count: int) -> list[bytes]:
        """Let go of the `count` blocks stored last, so that of every chain a leading part remains."""
        blocks = self._blocks
        gone = [blocks.popitem()[0] for _ in range(min(count, len(blocks)))]
        self._blocks = dict(blocks.items())  # a dict keeps the room it once had
        return gone

    def ids(self) -> list[bytes]:
        """Every block id, first stored first."""
        return list(self._blocks)

    def tiers(self, block_id: bytes) -> int:
        """The tiers that hold the block, as the sum of `1 << tier`; 0 is none."""
        return self._blocks.get(block_id, 0)

    def by_tier(self) -> dict[Tier, list[bytes]]:
        """Every block id, once for each tier it lies in; tiers that hold nothing are left out."""
        found = {tier: [i for i, tiers in self._blocks.items() if tiers & 1 << tier] for tier in Tier}
        return {tier: ids for tier, ids in found.items() if ids}

    def apply(self, event: Event) -> Iterable[bytes]:
        """Take one event; returns the ids it touched."""
        blocks = self._blocks
        if isinstance(event, Cleared):
            gone = list(blocks)
            keep = 0 if event.tier is None else ~(1 << event.tier)
            ids: Iterable[bytes] = gone
        elif isinstance(event, Stored):
            bit = 1 << event.tier
            for block_id in event.block_ids:
                blocks[block_id] = blocks.get(block_id, 0) | bit
            return event.block_ids
        else:
            ids = event.block_ids
            keep = ~(1 << event.tier)
        for block_id in ids:
            tiers = blocks.get(block_id, 0) & keep
            if tiers:
                blocks[block_id] = tiers
            else:
                blocks.pop(block_id, None)
        return ids


@dataclass
class Member:
    """One live worker.

    `position` is how far its events have been taken, None before its first snapshot. A member that was
    read back from the backend is `confirmed` once the worker has joined again.
    """

    worker: kvstore_pb2.Worker
    load: worker_pb2.WorkerLoad
    draining: bool = False
    read_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    confirmed: bool = True
    position: Position | None = None
    holdings: Holdings = field(default_factory=Holdings)

    @property
    def worker_id(self) -> str:
        return self.worker.worker_id

    @property
    def incarnation(self) -> str:
        return self.worker.incarnation

    def change(self, *, gone: bool = False) -> kvstore_pb2.RegistryUpdate.Change:
        """The member as Registry.Watch tells it; a copy, so it may wait in a queue."""
        return kvstore_pb2.RegistryUpdate.Change(
            worker=self.worker,
            load=self.load,
            draining=self.draining,
            gone=gone,
            read_bytes_per_s=self.read_bytes_per_s,
        )
