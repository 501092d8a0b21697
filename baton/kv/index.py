"""Which worker holds how much of a prompt: the replica of the prefix index that every router keeps.

Each tier is one table from block id to the set of workers that hold the block, the set being the bits
of an int. A worker holds all blocks before any block it holds (it evicts leaf first), so along a
prompt's chain the set only shrinks, and where two blocks have the same set, so has all between them:
a lookup probes the ends and halves only the stretches in which somebody drops out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from baton.kv.events import Cleared, Event, Removed, SequenceGate, Stored, Tier, Verdict, WorkerEvents

_SWEEP_PER_MESSAGE = 1024
_SWEEP_PER_BLOCK = 4
_MAX_SHARED_SETS = 65_536


class PrefixIndex:
    """A table of who holds what, fed by `apply` in the order the kvstore sends.

    Forgetting a worker costs nothing at once: its bit is retired, ignored from then on, and cleaned
    out of the tables a few entries at a time by the messages that follow.
    """

    def __init__(self) -> None:
        self._gate = SequenceGate()
        self._tables: dict[Tier, dict[bytes, int]] = {tier: {} for tier in Tier}
        self._bits: dict[str, int] = {}
        self._workers: dict[int, str] = {}
        self._live = 0
        self._retired = 0
        self._sweep: Iterator[bool] | None = None
        # Few distinct sets cover millions of blocks; equal ones share one int object.
        self._shared: dict[int, int] = {}

    def apply(self, message: WorkerEvents) -> Verdict:
        """Take one message. RESYNC means that the caller must subscribe again; nothing was changed."""
        verdict = self._gate.admit(message)
        if verdict is Verdict.REPLACE:
            self._retire(message.worker_id)
        if verdict in (Verdict.REPLACE, Verdict.APPLY):
            for event in message.events:
                self._take(message.worker_id, event)
        self._advance_sweep(_SWEEP_PER_MESSAGE + _SWEEP_PER_BLOCK * message.blocks())
        return verdict

    def drop(self, worker_id: str) -> None:
        """Forget a worker and its blocks."""
        self._gate.forget(worker_id)
        self._retire(worker_id)

    def incarnation(self, worker_id: str) -> str | None:
        """Whose blocks the replica has under this id, or None."""
        position = self._gate.position(worker_id)
        return None if position is None else position.incarnation

    def workers(self) -> list[str]:
        """The ids of all workers the replica knows something of."""
        return self._gate.workers()

    def lookup(self, block_ids: Sequence[bytes]) -> dict[str, int]:
        """How many leading blocks of a chain each worker holds, in any tier; those with none are left out."""
        tables = [table for table in self._tables.values() if table]
        if not block_ids or not tables:
            return {}
        probe = tables[0].get if len(tables) == 1 else _union(tables)
        first = probe(block_ids[0], 0) & self._live
        if not first:
            return {}
        held: dict[str, int] = {}
        last = len(block_ids) - 1
        final = probe(block_ids[last], 0) & first
        self._note(held, final, last + 1)
        stretches = [(0, first, last, final)]
        while stretches:
            low, low_set, high, high_set = stretches.pop()
            leaving = low_set & ~high_set
            if not leaving:
                continue
            if high - low <= 1:
                self._note(held, leaving, low + 1)
                continue
            middle = (low + high) // 2
            middle_set = (probe(block_ids[middle], 0) & low_set) | high_set
            stretches.append((low, low_set, middle, middle_set))
            stretches.append((middle, middle_set, high, high_set))
        return held

    def holders(self, block_id: bytes) -> dict[str, Tier]:
        """Every worker that holds the block, with the fastest tier it has it in."""
        found: dict[str, Tier] = {}
        for tier in Tier:
            for worker_id in self._names(self._tables[tier].get(block_id, 0) & self._live):
                found.setdefault(worker_id, tier)
        return found

    def __len__(self) -> int:
        """Entries in the tables: blocks, once per tier, those of workers not yet swept out included."""
        return sum(len(table) for table in self._tables.values())

    def _take(self, worker_id: str, event: Event) -> None:
        bit = self._bit(worker_id)
        if isinstance(event, Cleared):
            if event.tier is None:
                self._retire(worker_id)
            else:
                table = self._tables[event.tier]
                self._remove(table, [block_id for block_id, holders in table.items() if holders & bit], bit)
        elif isinstance(event, Removed):
            self._remove(self._tables[event.tier], event.block_ids, bit)
        else:
            self._store(self._tables[event.tier], event, bit)

    def _store(self, table: dict[bytes, int], event: Stored, bit: int) -> None:
        shared, get = self._shared, table.get
        if len(shared) > _MAX_SHARED_SETS:
            shared.clear()
        for block_id in event.block_ids:
            holders = get(block_id, 0) | bit
            table[block_id] = shared.setdefault(holders, holders)

    def _remove(self, table: dict[bytes, int], block_ids: Sequence[bytes], bit: int) -> None:
        remaining = self._live & ~bit
        shared = self._shared
        for block_id in block_ids:
            holders = table.get(block_id)
            if holders is not None:
                holders &= remaining
                if holders:
                    table[block_id] = shared.setdefault(holders, holders)
                else:
                    del table[block_id]

    def _bit(self, worker_id: str) -> int:
        bit = self._bits.get(worker_id)
        if bit is None:
            used = self._live | self._retired
            bit = ~used & (used + 1)  # the lowest one that is free
            self._bits[worker_id] = bit
            self._workers[bit] = worker_id
            self._live |= bit
        return bit

    def _retire(self, worker_id: str) -> None:
        bit = self._bits.pop(worker_id, None)
        if bit is not None:
            del self._workers[bit]
            self._live &= ~bit
            self._retired |= bit

    def _advance_sweep(self, entries: int) -> None:
        """Look at up to `entries` table entries for retired bits."""
        if self._sweep is None and self._retired:
            self._sweep = self._sweeping(self._retired)
        if self._sweep is not None:
            for _ in range(entries):
                if next(self._sweep, None) is None:
                    self._sweep = None
                    return

    def _sweeping(self, retired: int) -> Iterator[bool]:
        """Clean `retired` out of every entry, one per step, then free the bits for other workers."""
        for table in self._tables.values():
            for block_id in list(table):
                holders = table.get(block_id, 0)
                if holders & retired:
                    self._remove(table, (block_id,), retired)
                yield True
        self._retired &= ~retired

    def _note(self, held: dict[str, int], holders: int, blocks: int) -> None:
        for worker_id in self._names(holders):
            held[worker_id] = blocks

    def _names(self, holders: int) -> Iterator[str]:
        while holders:
            bit = holders & -holders
            yield self._workers[bit]
            holders ^= bit


def _union(tables: Sequence[dict[bytes, int]]) -> Callable[[bytes, int], int]:
    def probe(block_id: bytes, none: int) -> int:
        holders = none
        for table in tables:
            holders |= table.get(block_id, 0)
        return holders

    return probe
