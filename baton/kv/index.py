"""Which worker holds how much of a prompt: the replica of the prefix index that every router keeps.

Each tier is one table from block to the set of workers that hold it, the set being the bits of an int.
A worker holds all blocks before any block it holds (it evicts leaf first), so along a prompt's chain
the set only shrinks, and where two blocks have the same set, so has all between them: a lookup probes
the ends and halves only the stretches in which somebody drops out.

A table knows blocks by the last 64 bits of their ids. Two blocks that agree in those by chance cost a
wrong prediction, no more: workers know their blocks by all 128.

How the memory stays bounded: an entry carries beside its set the *generation* of its last use. What is
stored starts in the oldest generation there is; a chain that is looked up is lifted, root first, into
the newest. So no block is in a newer generation than the blocks before it, and giving up the oldest
generations whole makes no hole in any chain. A block that is stored after the ones before it were given
up is true all the same (its worker does hold them): it is only not found until they are stored again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from sys import getsizeof

from baton.kv.bits import WorkerBits
from baton.kv.events import (
    Event,
    PackedIds,
    Removed,
    SequenceGate,
    Stored,
    Tier,
    TierCounts,
    Verdict,
    WorkerEvents,
)

# A table is cut into shards by the low bits of the key, so that sweeping or growing one is short work.
_SHARD_BITS = 8
_SHARDS = 1 << _SHARD_BITS
_SHARD = _SHARDS - 1
_GENERATION_BITS = 32
_GENERATION = (1 << _GENERATION_BITS) - 1
_KEY = Struct("=Q").unpack_from
_KEY_BYTES = 32  # an int of up to 60 bits, as the allocator rounds it
_SET_BYTES = 48
_MAX_SHARED_SETS = 65_536
_SWEEP_PER_MESSAGE = 1024
_SWEEP_PER_BLOCK = 16
_MAX_WAITING_BLOCKS = 65_536
_MAX_FOUND = 1024
_PIECE = 1024
_HEADROOM = 8
_GENERATIONS = 16
_SAMPLED_SHARDS = 16

_Table = list[dict[int, int]]


class PrefixIndex:
    """A table of who holds what, fed by `apply` in the order the kvstore sends.

    Forgetting a worker costs nothing at once: its bit is retired, ignored from then on, and cleaned out
    of the tables a shard at a time by the messages that follow. Eviction works the same way.

    Args:
        max_bytes: memory that the tables may take; 0 is no bound. An eighth of it is room to work in.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._gate = SequenceGate()
        self._tables: dict[Tier, _Table] = {}
        self._bits = WorkerBits(reserved=_GENERATION)
        self._sweep: Iterator[int] | None = None
        self._sweep_budget = 0
        # Few distinct values cover millions of blocks; equal ones share one int object.
        self._shared: dict[int, int] = {}
        self._max_shared = min(_MAX_SHARED_SETS, max_bytes // 4096) if max_bytes else _MAX_SHARED_SETS
        self._max_bytes = max_bytes
        self._until_weighed = 0
        self._touching = False
        self._used: deque[Sequence[bytes]] = deque()
        self._used_blocks = 0
        self._lifted = 0
        self._cut = 0  # entries up to this generation are given up
        self._newest = 2
        self.evicted = 0
        """Entries given up to the bound so far."""
        self.keep_found = False
        """Whether to keep what lookups find for `take_found`."""
        self._found: list[Sequence[bytes]] = []
        self._found_blocks = 0

    def apply(self, message: WorkerEvents) -> Verdict:
        """Take one message. RESYNC means that the caller must subscribe again; nothing was changed."""
        verdict = self._gate.admit(message)
        if verdict is Verdict.REPLACE:
            self._bits.retire(message.worker_id)
        if verdict in (Verdict.REPLACE, Verdict.APPLY):
            for event in message.events:
                self._take(message.worker_id, event)
        self._advance_sweep(_SWEEP_PER_MESSAGE)
        return verdict

    def drop(self, worker_id: str) -> None:
        """Forget a worker and its blocks."""
        self._gate.forget(worker_id)
        self._bits.retire(worker_id)

    def incarnation(self, worker_id: str) -> str | None:
        """Whose blocks the replica has under this id, or None."""
        position = self._gate.position(worker_id)
        return None if position is None else position.incarnation

    def workers(self) -> list[str]:
        """The ids of all workers the replica knows something of."""
        return self._gate.workers()

    def lookup(self, block_ids: Sequence[bytes]) -> dict[str, int]:
        """How many leading blocks of a chain each worker holds, in any tier; those with none are left out."""
        held = self._lookup(block_ids, list(self._tables.values()))
        if self._touching and held and self._used_blocks + len(block_ids) <= _MAX_WAITING_BLOCKS:
            self._used.append(block_ids)
            self._used_blocks += len(block_ids)
        if self.keep_found and held:
            self._keep(block_ids)
        return held

    def take_found(self) -> list[Sequence[bytes]]:
        """The chains that lookups have found, in part or whole, since the last call, the first of them:
        at most 1024 with 65,536 blocks."""
        found, self._found, self._found_blocks = self._found, [], 0
        return found

    def _keep(self, block_ids: Sequence[bytes]) -> None:
        blocks = self._found_blocks + len(block_ids)
        if blocks <= _MAX_WAITING_BLOCKS and len(self._found) < _MAX_FOUND:
            self._found.append(block_ids)
            self._found_blocks = blocks

    def lookup_tiers(self, block_ids: Sequence[bytes]) -> dict[str, TierCounts]:
        """Like `lookup`, with how many of the leading blocks lie in which tier.

        No block counts as in a faster tier than one before it: a chain is read in order.
        """
        held = self.lookup(block_ids)
        if self._tables.keys() <= {Tier.DEVICE}:
            return {worker_id: TierCounts(device=blocks) for worker_id, blocks in held.items()}
        tables = [self._tables[tier] for tier in Tier if tier in self._tables]
        fast: dict[Tier, dict[str, int]] = {}
        for tier in (Tier.DEVICE, Tier.HOST):
            faster = [self._tables[t] for t in Tier if t <= tier and t in self._tables]
            fast[tier] = held if len(faster) == len(tables) else self._lookup(block_ids, faster)
        found = {}
        for worker_id, blocks in held.items():
            device = fast[Tier.DEVICE].get(worker_id, 0)
            host = max(device, fast[Tier.HOST].get(worker_id, 0))
            found[worker_id] = TierCounts(device, host - device, blocks - host)
        return found

    def holders(self, block_id: bytes) -> dict[str, Tier]:
        """Every worker that holds the block, with the fastest tier it has it in."""
        found: dict[str, Tier] = {}
        for tier in Tier:
            if tier in self._tables:
                for worker_id in self._bits.names(self._probe([self._tables[tier]])(block_id)):
                    found.setdefault(worker_id, tier)
        return found

    def __len__(self) -> int:
        """Entries in the tables: blocks, once per tier, those not yet swept out included."""
        return sum(len(shard) for table in self._tables.values() for shard in table)

    @property
    def memory_bytes(self) -> int:
        """Memory that the tables take."""
        shards = sum(getsizeof(shard) for table in self._tables.values() for shard in table)
        return shards + _KEY_BYTES * len(self) + getsizeof(self._shared) + _SET_BYTES * len(self._shared)

    # ---- reading ------------------------------------------------------------------------------

    def _probe(self, tables: Sequence[_Table]) -> Callable[[bytes], int]:
        """A function from a block id to the bits of its holders."""
        live, cut = self._bits.live, self._cut

        def of_one(block_id: bytes, table: _Table = tables[0]) -> int:
            key = _KEY(block_id, 8)[0]
            entry = table[key & _SHARD].get(key >> _SHARD_BITS, 0)
            return entry & live if entry & _GENERATION > cut else 0

        if len(tables) == 1:
            if self._sweep is not None:
                return of_one
            shards, unpack = tables[0], _KEY

            def of_one_swept(block_id: bytes) -> int:
                key: int = unpack(block_id, 8)[0]
                return shards[key & _SHARD].get(key >> _SHARD_BITS, 0) & live

            return of_one_swept

        def of_all(block_id: bytes) -> int:
            holders = 0
            for table in tables:
                holders |= of_one(block_id, table)
            return holders

        return of_all

    def _lookup(self, block_ids: Sequence[bytes], tables: Sequence[_Table]) -> dict[str, int]:
        if not block_ids or not tables:
            return {}
        probe = self._probe(tables)
        first = probe(block_ids[0])
        if not first:
            return {}
        held: dict[str, int] = {}
        last = len(block_ids) - 1
        final = probe(block_ids[last]) & first
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
            middle_set = (probe(block_ids[middle]) & low_set) | high_set
            stretches.append((low, low_set, middle, middle_set))
            stretches.append((middle, middle_set, high, high_set))
        return held

    def _note(self, held: dict[str, int], holders: int, blocks: int) -> None:
        for worker_id in self._bits.names(holders):
            held[worker_id] = blocks

    # ---- writing ------------------------------------------------------------------------------

    def _take(self, worker_id: str, event: Event) -> None:
        bit = self._bits.of(worker_id)
        if isinstance(event, Stored):
            table = self._tables.get(event.tier)
            if table is None:
                table = self._tables[event.tier] = [{} for _ in range(_SHARDS)]
            whole = event.block_ids
            for start in range(0, len(whole), _PIECE):
                piece = whole if len(whole) <= _PIECE else whole[start : start + _PIECE]
                self._store(table, piece, bit)
                if self._max_bytes:
                    self._keep_bound(len(piece))
                self._advance_sweep(_SWEEP_PER_BLOCK * len(piece))
        elif isinstance(event, Removed):
            if event.tier in self._tables:
                self._remove(self._tables[event.tier], event, bit)
        elif event.tier is None:
            self._bits.retire(worker_id)
        else:
            for shard in self._tables.get(event.tier, ()):
                for key in [key for key, entry in shard.items() if entry & bit]:
                    self._let_go(shard, key, bit)

    def _store(self, table: _Table, block_ids: Sequence[bytes], bit: int) -> None:
        shared, cut = self._shared, self._cut
        if len(shared) > self._max_shared:
            shared.clear()
        fresh = bit | (cut + 1)
        fresh = shared.setdefault(fresh, fresh)
        for key in _keys(block_ids):
            shard = table[key & _SHARD]
            key >>= _SHARD_BITS
            entry = shard.setdefault(key, fresh)
            if entry is not fresh:
                entry = entry | bit if entry & _GENERATION > cut else fresh
                shard[key] = shared.setdefault(entry, entry)

    def _remove(self, table: _Table, event: Removed, bit: int) -> None:
        for key in _keys(event.block_ids):
            self._let_go(table[key & _SHARD], key >> _SHARD_BITS, bit)

    def _let_go(self, shard: dict[int, int], key: int, bit: int) -> None:
        entry = shard.get(key)
        if entry is not None:
            remaining = entry & (self._bits.live & ~bit | _GENERATION)
            if remaining > _GENERATION:
                shard[key] = self._shared.setdefault(remaining, remaining)
            else:
                del shard[key]

    # ---- the bound ----------------------------------------------------------------------------

    def _keep_bound(self, stored: int) -> None:
        """Weigh the tables every so many blocks; when they are too heavy, begin to give entries up."""
        if 2 * self._used_blocks > _MAX_WAITING_BLOCKS:
            self._lift_one()
        self._until_weighed -= stored
        if self._until_weighed > 0 or self._sweep is not None:
            return
        room = self._max_bytes // _HEADROOM
        self._until_weighed = room // 1024
        weight = self.memory_bytes
        # What is used only matters once something may have to go.
        self._touching = 2 * weight > self._max_bytes
        if weight > self._max_bytes - room:
            while self._used:
                self._lift_one()
            self._cut = self._next_cut()
            self._newest = max(self._newest, self._cut + 2)
            self._sweep = self._sweeping(self._bits.retired, self._cut)

    def _lift_one(self) -> None:
        """Bring what is there of the chain that was looked up first into the newest generation.

        That is done some time after the lookup, when the worker that was chosen has stored the rest.
        """
        block_ids = self._used.popleft()
        self._used_blocks -= len(block_ids)
        shared, cut, newest, tables = self._shared, self._cut, self._newest, self._tables.values()
        for key in _keys(block_ids):
            number, key = key & _SHARD, key >> _SHARD_BITS
            found = False
            for table in tables:
                entry = table[number].get(key, 0)
                if entry & _GENERATION > cut:
                    entry = entry & ~_GENERATION | newest
                    table[number][key] = shared.setdefault(entry, entry)
                    found = True
            if not found:
                return
            self._lifted += 1
        if self._lifted > len(self) // _GENERATIONS:
            self._newest += 1
            self._lifted = 0

    def _next_cut(self) -> int:
        """The generation up to which entries must go for an eighth of them to be free."""
        generations: Counter[int] = Counter()
        for table in self._tables.values():
            for shard in table[:: _SHARDS // _SAMPLED_SHARDS]:
                generations.update(entry & _GENERATION for entry in shard.values())
        enough = generations.total() // _HEADROOM
        going = 0
        for generation in sorted(generations):
            going += generations[generation]
            if going > enough:
                return generation
        return self._newest

    # ---- sweeping -----------------------------------------------------------------------------

    def _advance_sweep(self, entries: int) -> None:
        """Clean shards, looking at about `entries` entries."""
        if self._sweep is None:
            if not self._bits.retired:
                return
            self._sweep = self._sweeping(self._bits.retired, self._cut)
        self._sweep_budget += entries
        while self._sweep_budget > 0:
            seen = next(self._sweep, None)
            if seen is None:
                self._sweep = None
                self._sweep_budget = 0
                return
            self._sweep_budget -= seen

    def _sweeping(self, retired: int, cut: int) -> Iterator[int]:
        """Clean `retired` and generations up to `cut` out of every shard, one per step.

        Yields how many entries were looked at. In the end the retired bits are free for other workers.
        """
        for tier, table in list(self._tables.items()):
            for number, shard in enumerate(table):
                if shard:
                    table[number] = self._cleaned(shard, retired, cut)
                yield 1 + len(shard)
            if not any(table):
                del self._tables[tier]
        self._bits.free(retired)

    def _cleaned(self, shard: dict[int, int], retired: int, cut: int) -> dict[int, int]:
        shared = self._shared
        kept: dict[int, int] = {}
        for key, entry in shard.items():
            if entry & _GENERATION <= cut:
                self.evicted += 1
                continue
            if entry & retired:
                entry &= ~retired
                if entry <= _GENERATION:
                    continue
            kept[key] = shared.setdefault(entry, entry)
        return kept


def _keys(block_ids: Sequence[bytes]) -> list[int]:
    """The last 64 bits of each id."""
    raw = block_ids.raw if isinstance(block_ids, PackedIds) else b"".join(block_ids)
    return memoryview(raw).cast("Q")[1::2].tolist()
