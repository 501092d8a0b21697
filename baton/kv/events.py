"""What workers say about the blocks they hold, and whether what they say can be believed in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from itertools import pairwise
from typing import overload

from baton.kv.hashing import BLOCK_ID_BYTES


class Tier(IntEnum):
    """Where a block lies in a worker, fastest first. The numbers are those on the wire."""

    DEVICE = 1
    HOST = 2
    DISK = 3


@dataclass(frozen=True, slots=True)
class TierCounts:
    """How many leading blocks of a chain a worker holds, each counted in the fastest tier that has it."""

    device: int = 0
    host: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        """Leading blocks held in any tier."""
        return self.device + self.host + self.disk


class PackedIds(Sequence[bytes]):
    """Block ids as they come over the wire: 16 bytes each, end to end, taken apart when asked for."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw) // BLOCK_ID_BYTES

    @overload
    def __getitem__(self, at: int) -> bytes: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[bytes]: ...

    def __getitem__(self, at: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step == 1:
                return PackedIds(self.raw[BLOCK_ID_BYTES * start : BLOCK_ID_BYTES * stop])
            return list(self)[at]
        start = BLOCK_ID_BYTES * range(len(self))[at]
        return self.raw[start : start + BLOCK_ID_BYTES]

    def __iter__(self) -> Iterator[bytes]:
        raw = self.raw
        return (raw[start : start + BLOCK_ID_BYTES] for start in range(0, len(raw), BLOCK_ID_BYTES))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Stored:
    """The worker now holds these blocks in `tier`. Ids are 16 bytes, parents before children."""

    block_ids: Sequence[bytes]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class Removed:
    """The worker no longer holds these blocks in `tier`."""

    block_ids: Sequence[bytes]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class Cleared:
    """The worker holds nothing in `tier` any more; None is every tier."""

    tier: Tier | None = None


Event = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class WorkerEvents:
    """One message of one worker: events in the order they happened.

    `sequence` counts 1, 2, 3 ... within an incarnation. A snapshot's events are everything the worker
    holds as of `sequence`; a snapshot too large for one message goes on in ordinary ones behind it.
    """

    worker_id: str
    incarnation: str
    sequence: int
    snapshot: bool
    events: tuple[Event, ...]

    def blocks(self) -> int:
        """How many block ids the message carries."""
        return sum(len(event.block_ids) for event in self.events if not isinstance(event, Cleared))


class Verdict(Enum):
    """What to do with a message. See `SequenceGate.admit`."""

    APPLY = "apply"
    REPLACE = "replace"
    DUPLICATE = "duplicate"
    RESYNC = "resync"


@dataclass(frozen=True, slots=True)
class Position:
    """How far a worker's events have been taken."""

    incarnation: str
    sequence: int


class SequenceGate:
    """Admits each worker's messages in order, once, and never guesses across a gap.

    The kvstore and every replica of its index decide by this same class.
    """

    def __init__(self) -> None:
        self._positions: dict[str, Position] = {}

    def admit(self, message: WorkerEvents) -> Verdict:
        """Say what to do with `message`, and take note of it when it is to be used.

        APPLY: the next one; REPLACE: a snapshot, forget the worker's blocks first; DUPLICATE: already
        taken; RESYNC: something before it is missing or the incarnation is unknown: ask for a snapshot.
        """
        position = self._positions.get(message.worker_id)
        if message.snapshot:
            verdict = Verdict.REPLACE
        elif position is None or position.incarnation != message.incarnation:
            return Verdict.RESYNC
        elif message.sequence <= position.sequence:
            return Verdict.DUPLICATE
        elif message.sequence == position.sequence + 1:
            verdict = Verdict.APPLY
        else:
            return Verdict.RESYNC
        self._positions[message.worker_id] = Position(message.incarnation, message.sequence)
        return verdict

    def position(self, worker_id: str) -> Position | None:
        """The last message taken from the worker, or None if there was none since `forget`."""
        return self._positions.get(worker_id)

    def workers(self) -> list[str]:
        """The ids of all workers that have a position."""
        return list(self._positions)

    def restore(self, worker_id: str, position: Position) -> None:
        """Go on from a position that was saved together with the worker's blocks."""
        self._positions[worker_id] = position

    def forget(self, worker_id: str) -> None:
        """Let the worker's next message be a snapshot."""
        self._positions.pop(worker_id, None)


def pack(events: Sequence[Event], max_blocks: int, max_events: int) -> Iterator[tuple[Event, ...]]:
    """Deal events out to messages, in order, each as full as its two limits allow; an empty one for none."""
    piece: list[Event] = []
    room = max_blocks
    for event in events:
        if isinstance(event, Cleared):
            parts: list[Event] = [event]
        else:
            cuts = [0, *range(room, len(event.block_ids), max_blocks), len(event.block_ids)]
            parts = [replace(event, block_ids=event.block_ids[low:high]) for low, high in pairwise(cuts)]
        for part in parts:
            blocks = 0 if isinstance(part, Cleared) else len(part.block_ids)
            if blocks > room or len(piece) == max_events:
                yield tuple(piece)
                piece, room = [], max_blocks
            piece.append(part)
            room -= blocks
    yield tuple(piece)


def snapshot_pieces(
    worker_id: str, position: Position, held: Mapping[Tier, Sequence[bytes]], max_blocks: int
) -> list[WorkerEvents]:
    """A worker's blocks as messages of at most `max_blocks` ids that end at `position`.

    The first is a snapshot, the rest follow it in sequence. There is always room below `position` for
    their numbers: whoever got there took no more than `max_blocks` ids with each message.
    """
    events = [Stored(ids, tier) for tier, ids in held.items()]
    pieces = list(pack(events, max_blocks, max_events=2 * len(Tier)))
    first = position.sequence - len(pieces) + 1
    return [
        WorkerEvents(worker_id, position.incarnation, first + index, index == 0, piece)
        for index, piece in enumerate(pieces)
    ]
