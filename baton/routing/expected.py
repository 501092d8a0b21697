"""Which blocks are workers about to hold, because prompts with them are on their way there?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Coming:
    """A prompt on its way to a worker, until `Expected.remove`."""

    __slots__ = ("chain", "family", "named", "worker_id")

    def __init__(self, worker_id: str, chain: Sequence[bytes], family: _Family | None) -> None:
        self.worker_id = worker_id
        self.chain = chain
        self.family = family
        self.named: list[bytes] | None = None


class _Family:
    """Prompts on their way to one worker that begin with the same block.

    Most prompts are one of a kind, and naming all blocks of a prompt is work: it is left until another
    prompt with that beginning is looked up.
    """

    def __init__(self, first: bytes) -> None:
        self.first = first
        self.unnamed: dict[Coming, None] = {}
        self.counts: Counter[bytes] = Counter()

    def blocks(self) -> Counter[bytes]:
        for coming in self.unnamed:
            coming.named = list(coming.chain)
            self.counts.update(coming.named)
        self.unnamed.clear()
        return self.counts

    def remove(self, coming: Coming) -> None:
        if coming.named is None:
            del self.unnamed[coming]
            return
        for block_id in coming.named:
            if self.counts[block_id] > 1:
                self.counts[block_id] -= 1
            else:
                del self.counts[block_id]

    @property
    def empty(self) -> bool:
        return not (self.unnamed or self.counts)


class Expected:
    """The blocks of prompts that were sent to workers and are not computed yet.

    A worker takes prompts in order, so by the time it begins one, it holds what those before it have in
    common with it. Without this, prompts that begin alike and come together would each be sent where it is
    quiet, and each be computed whole.
    """

    def __init__(self) -> None:
        self._families: dict[bytes, dict[str, _Family]] = {}
        """By the first block of the prompts, then by worker."""

    def add(self, worker_id: str, chain: Sequence[bytes]) -> Coming:
        """A prompt whose blocks are named by `chain` goes to the worker."""
        if not chain:
            return Coming(worker_id, chain, None)
        first = chain[0]
        alike = self._families.setdefault(first, {})
        family = alike.get(worker_id)
        if family is None:
            family = alike[worker_id] = _Family(first)
        coming = Coming(worker_id, chain, family)
        family.unnamed[coming] = None
        return coming

    def remove(self, coming: Coming) -> None:
        """A prompt that was added is computed, or never will be. Once for each."""
        family = coming.family
        if family is None:
            return  # it has no whole block
        alike = self._families.get(family.first, {})
        if alike.get(coming.worker_id) is not family:
            return  # the worker was forgotten meanwhile
        family.remove(coming)
        if family.empty:
            self._drop(coming.worker_id, family.first)

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        for first in [first for first, alike in self._families.items() if worker_id in alike]:
            self._drop(worker_id, first)

    def lookup(self, chain: Sequence[bytes]) -> dict[str, int]:
        """How many leading blocks of a chain each worker is about to hold; those with none are left out."""
        if not chain or not self._families:
            return {}
        alike = self._families.get(chain[0], {})
        return {worker_id: _leading(chain, family.blocks()) for worker_id, family in alike.items()}

    def _drop(self, worker_id: str, first: bytes) -> None:
        alike = self._families[first]
        del alike[worker_id]
        if not alike:
            del self._families[first]


def _leading(chain: Sequence[bytes], known: Counter[bytes]) -> int:
    """Blocks of a chain up to the last known one: whoever has a block has those before it."""
    low, high = 1, len(chain)
    while low < high:
        middle = (low + high + 1) // 2
        if chain[middle - 1] in known:
            low = middle
        else:
            high = middle - 1
    return low
