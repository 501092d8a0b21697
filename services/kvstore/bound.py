"""What does a full index forget? What was of use longest ago, whichever worker holds it.

Time is counted in generations: a new one begins with every sixteenth of the index that is stored or looked
up. A block is of use when its worker stores it and when a router finds it for a prompt. A prompt's blocks are
all found together and stored no later than those behind them, so of a chain the end goes no later than the
beginning, and what remains of it has no holes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from services.kvstore.holdings import Holdings

_HEADROOM = 8
_GENERATIONS = 16
_SWEPT_PER_BLOCK = 16
_SWEPT_PER_CALL = 1024
_PIECE = 1024


class IndexBound:
    """Keeps the memory of all workers' holdings within `max_bytes`; 0 is no bound.

    Forgetting begins when an eighth of the bound is left, and goes on a worker at a time with the calls that
    follow, so that no single one takes long.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._held: dict[str, Holdings] = {}
        self._weights: dict[str, tuple[int, int]] = {}  # bytes and entries
        self._entries = 0
        self._used = 0
        self._cut = 0
        self._sweep: list[str] = []
        self.bytes = 0
        """Memory that the blocks of all workers take."""
        self.generation = 1
        """When it is now."""
        self.forgotten = 0
        """Entries forgotten so far."""

    @property
    def pressed(self) -> bool:
        """Whether something may have to go before long, so that it matters what is of use."""
        return bool(self._max_bytes) and 2 * self.bytes > self._max_bytes

    def stored(self, holdings: Holdings, block_ids: Sequence[bytes]) -> None:
        """These have just been stored. Of very many at once, those at the end count as the older ones."""
        if len(block_ids) <= _PIECE:
            self._pass_time(len(block_ids))
            return
        for start in reversed(range(0, len(block_ids), _PIECE)):
            piece = block_ids[start : start + _PIECE]
            holdings.use(piece, self.generation)
            self._pass_time(len(piece))

    def _pass_time(self, blocks: int) -> None:
        self._used += blocks
        if _GENERATIONS * self._used > self._entries:
            self.generation += 1
            self._used = 0

    def weigh(self, worker_id: str, holdings: Holdings) -> None:
        """Take into account what the worker holds now."""
        self.drop(worker_id)
        weight, entries = holdings.memory_bytes, len(holdings)
        self.bytes += weight
        self._entries += entries
        self._weights[worker_id] = (weight, entries)
        self._held[worker_id] = holdings

    def drop(self, worker_id: str) -> None:
        """The worker is gone."""
        weight, entries = self._weights.pop(worker_id, (0, 0))
        self.bytes -= weight
        self._entries -= entries
        self._held.pop(worker_id, None)

    def use(self, chains: Sequence[Sequence[bytes]]) -> None:
        """Chains were looked up."""
        for block_ids in chains:
            for holdings in self._held.values():
                if block_ids and block_ids[0] in holdings:
                    self._pass_time(holdings.use(block_ids, self.generation))

    def forget(self, stored: int) -> Iterator[tuple[str, list[bytes]]]:
        """Let go of what must go now that `stored` entries have come; yields whose ids went."""
        if not self._max_bytes:
            return
        budget = _SWEPT_PER_CALL + _SWEPT_PER_BLOCK * stored
        while self._sweep or self._begin():
            if budget <= 0 and self.bytes <= self._max_bytes:
                return
            worker_id = self._sweep.pop()
            holdings = self._held.get(worker_id)
            if holdings is not None:
                budget -= len(holdings)
                gone = holdings.forget(self._cut)
                self.forgotten += len(gone)
                self.weigh(worker_id, holdings)
                if gone:
                    yield worker_id, gone

    def _begin(self) -> bool:
        """Choose which generations go, if any have to."""
        if self.bytes <= self._max_bytes - self._max_bytes // _HEADROOM:
            return False
        generations: Counter[int] = Counter()
        for holdings in self._held.values():
            generations.update(holdings.generations())
        enough = generations.total() // _HEADROOM
        going = 0
        for generation in sorted(generations):
            self._cut = generation
            going += generations[generation]
            if going > enough:
                break
        self.generation = max(self.generation, self._cut + 1)
        self._sweep = list(self._held) if generations else []
        return bool(self._sweep)
