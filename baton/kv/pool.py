"""Who owns each KV block: free list, reference counts, and the prefix tree of shareable blocks.

Blocks are numbers; the bytes live elsewhere. A block is *private* (one owner, no identity), *shared*
(it has an identity in the prefix tree) or free. A shared block that nobody references stays in the
tree until its place is needed, and goes leaf first: if the pool holds a block of a chain it holds every
block before it. Of the leaves, copies of what another worker keeps go first, then the least recently
used. With tiers below (`baton.kv.lower`) a block goes there.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.kv.changes import Changes
from baton.kv.events import Event, Tier
from baton.kv.lower import Held, LowerTiers

_COPY = -(1 << 62)
"""Added to the time of a copy's last use: it goes before everything that is none."""


class NoFreeBlocks(Exception):
    """Fewer blocks are free or evictable than were asked for. Nothing was allocated."""


@dataclass(eq=False)
class _Node:
    """A shared block's place in the prefix tree."""

    block_id: bytes
    block: int
    parent: _Node | None
    children: int = 0
    references: int = 0
    goes_at: int = 0


@dataclass
class BlockPool:
    """The blocks of one worker. Not thread-safe: one owner calls it.

    Every method that takes blocks takes them as pool indices in chain order.
    """

    total_blocks: int
    lower: LowerTiers | None = field(default=None, init=False)
    _free: list[int] = field(init=False)
    _nodes: dict[bytes, _Node] = field(init=False, default_factory=dict)
    _shared: dict[int, _Node] = field(init=False, default_factory=dict)
    _leaves: list[tuple[int, int, _Node]] = field(init=False, default_factory=list)
    _offers: int = field(init=False, default=0)
    _unreferenced: int = field(init=False, default=0)
    _clock: int = field(init=False, default=0)
    _changes: Changes = field(init=False, default_factory=Changes)

    def __post_init__(self) -> None:
        self._free = list(range(self.total_blocks - 1, -1, -1))

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now: free ones and unreferenced shared ones."""
        return len(self._free) + self._unreferenced

    @property
    def cached(self) -> int:
        """Blocks in the prefix tree."""
        return len(self._nodes)

    @property
    def pinned(self) -> int:
        """Blocks that somebody owns or references."""
        return self.total_blocks - self.available

    def match(self, chain: Sequence[bytes]) -> int:
        """How many leading blocks of `chain` the pool holds."""
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in self._nodes:
                low = middle
            else:
                high = middle - 1
        return low

    def acquire(self, chain: Sequence[bytes]) -> list[int]:
        """Reference the blocks of `chain`, all of which the pool must hold (see `match`)."""
        return [self._reference(self._nodes[block_id]) for block_id in chain]

    def allocate(self, count: int) -> list[int]:
        """Take `count` private blocks, evicting unreferenced leaves as needed.

        Raises:
            NoFreeBlocks: see the class.
        """
        if count > self.available:
            raise NoFreeBlocks(f"{count} KV blocks wanted, {self.available} of {self.total_blocks} available")
        if len(self._free) < count:
            while len(self._free) < count:
                self._evict_one()
            if self.lower is not None:
                self.lower.sink.settle()
        return [self._free.pop() for _ in range(count)]

    def share(self, block: int, block_id: bytes, parent_id: bytes | None) -> int:
        """Give the private, completely written `block` an identity; return the block to use from now on.

        When the tree already holds `block_id` in another block, the caller's block is freed and the
        other one, with the same content, is referenced in its place. `parent_id` is the block before,
        which the caller must reference; None for the first of a chain.
        """
        known = self._nodes.get(block_id)
        if known is not None:
            self._free.append(block)
            return self._reference(known)
        parent = None if parent_id is None else self._nodes[parent_id]
        if parent is not None:
            parent.children += 1
        node = _Node(block_id, block, parent, references=1, goes_at=self._clock)
        self._nodes[block_id] = node
        self._shared[block] = node
        if self.lower is not None:
            self.lower.supersede(block_id)
        self._changes.stored(Tier.DEVICE, block_id)
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each of `blocks`: private ones are free, shared ones stay cached."""
        self._release(blocks, 0)

    def release_copies(self, blocks: Sequence[int]) -> None:
        """As `release`, of blocks that another worker keeps: they go first, unless they are used again."""
        self._release(blocks, _COPY)

    def _release(self, blocks: Sequence[int], order: int) -> None:
        self._clock += 1
        for block in reversed(blocks):
            node = self._shared.get(block)
            if node is None:
                self._free.append(block)
                continue
            node.references -= 1
            node.goes_at = self._clock + order
            if node.references == 0:
                self._unreferenced += 1
                if node.children == 0:
                    self._offer(node)

    def put_below(self, lower: LowerTiers) -> None:
        """Let evicted blocks go to `lower` from now on; the pool must not have shared any yet."""
        self.lower, self._changes = lower, lower.changes

    def match_below(self, chain: Sequence[bytes], start: int) -> int:
        """How many blocks of `chain` after the first `start`, which the pool holds, lie in lower tiers."""
        return 0 if self.lower is None else self.lower.match(chain, start)

    def hold_below(self, chain: Sequence[bytes]) -> list[Held]:
        """Keep blocks that lie in lower tiers in place, to bring them up (see `LowerTiers.hold`)."""
        return [] if self.lower is None else self.lower.hold(chain)

    def let_go(self, held: Sequence[Held]) -> None:
        """End `hold_below` of blocks that are still readable."""
        for one in held:
            self._lower().let_go(one)

    def lose(self, held: Held) -> None:
        """End `hold_below` of a block that could not be read."""
        self._lower().let_go(held, lost=True)

    def held_ids(self) -> dict[Tier, list[bytes]]:
        """Identities of all blocks held, by tier, parents before children."""
        held = {Tier.DEVICE: list(self._nodes)}
        if self.lower is not None:
            held |= {tier: self.lower.ids(tier) for tier in (Tier.HOST, Tier.DISK)}
        return held

    def take_events(self) -> list[Event]:
        """What was stored and removed since the last call."""
        return self._changes.take()

    def _lower(self) -> LowerTiers:
        if self.lower is None:
            raise ValueError("the pool has no lower tiers")
        return self.lower

    def _reference(self, node: _Node) -> int:
        if node.references == 0:
            self._unreferenced -= 1
        node.references += 1
        return node.block

    def _offer(self, node: _Node) -> None:
        if len(self._leaves) > 2 * self.total_blocks + 64:
            self._leaves = [entry for entry in self._leaves if self._is_current(entry)]
            heapq.heapify(self._leaves)
        self._offers += 1
        heapq.heappush(self._leaves, (node.goes_at, self._offers, node))

    def _is_current(self, entry: tuple[int, int, _Node]) -> bool:
        goes_at, _, node = entry
        return (
            self._nodes.get(node.block_id) is node
            and node.references == 0
            and node.children == 0
            and node.goes_at == goes_at
        )

    def _evict_one(self) -> None:
        """Remove the leaf that goes first of those that nobody references.

        Entries of the heap go stale when their node is used again, gets a child or leaves the tree;
        they are recognised here instead of being searched for then.
        """
        while not self._is_current(entry := heapq.heappop(self._leaves)):
            pass
        node = entry[2]
        del self._nodes[node.block_id]
        del self._shared[node.block]
        self._unreferenced -= 1
        self._free.append(node.block)
        if self.lower is not None:
            parent_id = None if node.parent is None else node.parent.block_id
            self.lower.take(node.block_id, parent_id, node.block)
        self._changes.removed(Tier.DEVICE, node.block_id)
        if node.parent is not None:
            node.parent.children -= 1
            if node.parent.children == 0 and node.parent.references == 0:
                self._offer(node.parent)
