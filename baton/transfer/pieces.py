"""Which heads of a block lie in which pool, when a worker keeps its blocks in one piece per device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
from baton.kv.heads import heads_of


class Pieces:
    """The pools of this worker, `storages`, which together hold blocks of `layout`; and how the same blocks
    lie in the pools of workers with another number of devices.

    A pool's axes are those that `layout.format` names, behind that of blocks.
    """

    def __init__(self, storages: Sequence[torch.Tensor], layout: KvLayout) -> None:
        self.storages, self.layout = tuple(storages), layout
        axes = layout.format.split(",")
        #: Which axis of a pool counts heads; None where blocks cannot be cut.
        self._axis = 1 + axes.index("head") if "head" in axes else None
        self._kv_heads = 1
        if self._axis is not None:
            pool = storages[0]
            self._kv_heads = pool.shape[self._axis] * pool.shape[0] * layout.block_bytes // pool.nbytes

    def heads(self, number: int, count: int) -> range:
        """The heads in piece `number` of `count`."""
        return heads_of(number, count, self._kv_heads)

    def layout_of(self, count: int) -> KvLayout:
        """Of one piece of blocks that are in `count`.

        Raises:
            HandoffFailed: they cannot be.
        """
        if count == 1:
            return self.layout
        if self._axis is None or (self._kv_heads % count and count % self._kv_heads):
            raise HandoffFailed(f"KV blocks of {self._kv_heads} heads cannot be in {count} pieces")
        held = len(self.heads(0, count))
        return replace(self.layout, block_bytes=self.layout.block_bytes // self._kv_heads * held)

    def distinct(self, count: int) -> list[int]:
        """The numbers of pieces that have every head once: of more devices than heads, not all."""
        by_heads = {self.heads(number, count): number for number in range(count)}
        return sorted(by_heads.values())

    def room(self, number: int, count: int, blocks: int) -> torch.Tensor:
        """An empty pool of `blocks` pieces of `count`, on the device of our pool `number`."""
        pool = self.storages[number]
        shape = [blocks, *pool.shape[1:]]
        if self._axis is not None:
            shape[self._axis] = len(self.heads(0, count))
        return torch.empty(shape, dtype=pool.dtype, device=pool.device)

    def deal_out(self, arrived: torch.Tensor, number: int, count: int, blocks: Sequence[int]) -> None:
        """Copy the heads of `arrived` [len(blocks), ...], pieces `number` of `count`, to wherever our pools
        have them, into these blocks."""
        assert self._axis is not None
        theirs = self.heads(number, count)
        for pool_number, pool in enumerate(self.storages):
            ours = self.heads(pool_number, len(self.storages))
            first, end = max(ours.start, theirs.start), min(ours.stop, theirs.stop)
            if first < end:
                heads = arrived.narrow(self._axis, first - theirs.start, end - first).to(pool.device)
                places = torch.tensor(blocks, device=pool.device)
                pool.narrow(self._axis, first - ours.start, end - first)[places] = heads

    def whole(self, block: int) -> torch.Tensor:
        """Our block with all its heads, on the CPU: [1, ...], as a pool that has them all."""
        numbers = self.distinct(len(self.storages))
        pieces = [self.storages[number][block : block + 1].cpu() for number in numbers]
        return pieces[0] if self._axis is None else torch.cat(pieces, self._axis)
