"""Which bit of a set of workers stands for which worker?"""

from __future__ import annotations

from collections.abc import Iterator


class WorkerBits:
    """Gives each worker a bit of an int.

    A worker that is gone is only retired: its bit stands for nobody else until `free` says that it is in no
    set any more.

    Args:
        reserved: bits that are given to nobody.
    """

    def __init__(self, reserved: int) -> None:
        self._reserved = reserved
        self._bits: dict[str, int] = {}
        self._workers: dict[int, str] = {}
        self.live = 0
        """The bits of workers."""
        self.retired = 0
        """The bits of workers that are gone and may be in sets still."""

    def of(self, worker_id: str) -> int:
        """The worker's bit; the lowest one that is free, if it has none yet."""
        bit = self._bits.get(worker_id)
        if bit is None:
            used = self.live | self.retired | self._reserved
            bit = ~used & (used + 1)
            self._bits[worker_id] = bit
            self._workers[bit] = worker_id
            self.live |= bit
        return bit

    def retire(self, worker_id: str) -> None:
        """Forget the worker, if it is known; it gets another bit should it come back."""
        bit = self._bits.pop(worker_id, None)
        if bit is not None:
            del self._workers[bit]
            self.live &= ~bit
            self.retired |= bit

    def free(self, bits: int) -> None:
        """Let other workers have these of the retired bits."""
        self.retired &= ~bits

    def names(self, bits: int) -> Iterator[str]:
        """The workers that live bits stand for."""
        while bits:
            bit = bits & -bits
            yield self._workers[bit]
            bits ^= bit
