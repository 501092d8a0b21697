"""Which blocks are workers about to hold, because prompts with them are on their way there?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Expected:
    """The blocks of prompts that were sent to workers and are not computed yet.

    A worker takes prompts in order, so by the time it begins one, it holds what those before it have in
    common with it. Without this, prompts that begin alike and come together would each be sent where it is
    quiet, and each be computed whole.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Counter[bytes]] = {}

    def add(self, worker_id: str, block_ids: Sequence[bytes]) -> None:
        """A prompt goes to the worker."""
        self._counts.setdefault(worker_id, Counter()).update(block_ids)

    def remove(self, worker_id: str, block_ids: Sequence[bytes]) -> None:
        """A prompt that was added is computed, or never will be."""
        counts = self._counts.get(worker_id)
        if counts is None:
            return  # forgotten meanwhile
        for block_id in block_ids:
            if counts[block_id] > 1:
                counts[block_id] -= 1
            else:
                del counts[block_id]
        if not counts:
            del self._counts[worker_id]

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        self._counts.pop(worker_id, None)

    def lookup(self, block_ids: Sequence[bytes]) -> dict[str, int]:
        """How many leading blocks of a chain each worker is about to hold; those with none are left out."""
        found = {}
        if block_ids:
            first = block_ids[0]
            for worker_id, counts in self._counts.items():
                if first in counts:
                    found[worker_id] = _leading(block_ids, counts)
        return found


def _leading(block_ids: Sequence[bytes], known: Counter[bytes]) -> int:
    """Blocks of a chain up to the last known one: whoever has a block has those before it."""
    low, high = 1, len(block_ids)
    while low < high:
        middle = (low + high + 1) // 2
        if block_ids[middle - 1] in known:
            low = middle
        else:
            high = middle - 1
    return low
