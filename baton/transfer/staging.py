"""Reading blocks from workers that spread them over another number of devices than this one does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch

from baton.device import device_of
from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
from baton.transfer.base import PoolDescription, ReadReport, Transfer
from baton.transfer.pieces import Pieces

STAGING_BYTES = 64 * 1024 * 1024
"""Memory on each device of this worker where blocks land before their heads are dealt out."""

BAYS = 4
"""Into how many parts that is divided: a read holds one, so that one that hangs does not stop the others."""

Create = Callable[[torch.Tensor, KvLayout, str, str], Transfer]
"""Makes the transfer of one pool: (storage, layout, worker id, incarnation)."""


class Staging:
    """A pool on each of our devices for pieces of blocks as those peers have them that cut blocks in `count`.

    A piece is read once, by one of the devices that want some of its heads; they take turns. Each pool is
    read into by a transfer of its own, as ever, and its heads are then copied to their places.
    """

    def __init__(self, create: Create, pieces: Pieces, count: int, worker_id: str, incarnation: str) -> None:
        layout = pieces.layout_of(count)
        self._pieces, self._count = pieces, count
        self._bay_blocks = max(1, STAGING_BYTES // BAYS // layout.block_bytes)
        self._bays: asyncio.Queue[int] = asyncio.Queue()
        for bay in range(BAYS):
            self._bays.put_nowait(bay * self._bay_blocks)
        ours = len(pieces.storages)
        self._pools = [pieces.room(number, count, BAYS * self._bay_blocks) for number in range(ours)]
        self._transfers = [
            create(pool, layout, f"{worker_id}.{number}", incarnation)
            for number, pool in enumerate(self._pools)
        ]
        self._devices = [device_of(device) for device in {pool.device for pool in self._pools}]
        # What each of our pools reads: pieces by number, and of those every so manieth block from one on.
        self._shares: list[list[tuple[int, slice]]] = [[] for _ in self._pools]
        for piece in pieces.distinct(count):
            wanted = set(pieces.heads(piece, count))
            readers = [number for number in range(ours) if wanted & set(pieces.heads(number, ours))]
            for turn, number in enumerate(readers):
                self._shares[number].append((piece, slice(turn, None, len(readers))))

    async def add_peer(self, pools: Sequence[PoolDescription]) -> None:
        """See `Transfer.add_peer`; `pools` are all those of the peer."""
        for transfer, pool in self._paths(pools):
            await transfer.add_peer(pool)

    async def remove_peer(self, pools: Sequence[PoolDescription]) -> None:
        """See `Transfer.remove_peer`."""
        for transfer, pool in self._paths(pools):
            await transfer.remove_peer(pool.agent_name)

    async def warm_up(self, pools: Sequence[PoolDescription], timeout_s: float) -> ReadReport:
        """See `Transfer.warm_up`."""
        return await all_read(
            [transfer.warm_up(pool.agent_name, timeout_s) for transfer, pool in self._paths(pools)]
        )

    async def read(
        self,
        pools: Sequence[PoolDescription],
        source_blocks: Sequence[int],
        destination_blocks: Sequence[int],
        timeout_s: float,
    ) -> ReadReport:
        """See `Transfer.read`."""
        pairs = list(zip(source_blocks, destination_blocks, strict=True))
        try:
            async with asyncio.timeout(timeout_s):
                bay = await self._bays.get()
                try:
                    reads = [
                        self._read(number, pools, pairs, bay, timeout_s) for number in range(len(self._pools))
                    ]
                    return await all_read(reads)
                finally:
                    self._bays.put_nowait(bay)
        except TimeoutError as error:
            name = pools[0].agent_name
            raise HandoffFailed(f"{name} did not deliver within {timeout_s:.1f} s") from error

    def close(self) -> None:
        """See `Transfer.close`."""
        for transfer in self._transfers:
            transfer.close()

    async def _read(
        self,
        number: int,
        pools: Sequence[PoolDescription],
        pairs: Sequence[tuple[int, int]],
        bay: int,
        timeout_s: float,
    ) -> ReadReport:
        """Read what falls to our pool `number`, one bay full after the other."""
        started, moved = time.monotonic(), 0
        for piece, share in self._shares[number]:
            for part in _batched(pairs[share], self._bay_blocks):
                sources, destinations = zip(*part, strict=True)
                landing = range(bay, bay + len(part))
                report = await self._transfers[number].read(
                    pools[piece].agent_name, sources, landing, timeout_s
                )
                arrived = self._pools[number][landing.start : landing.stop]
                await _to_the_end(partial(self._deal_out, arrived, piece, destinations))
                moved += report.bytes
        return ReadReport(moved, time.monotonic() - started)

    def _deal_out(self, arrived: torch.Tensor, piece: int, blocks: Sequence[int]) -> None:
        with ExitStack() as stack:
            for device in self._devices:
                stack.enter_context(device.beside())
            self._pieces.deal_out(arrived, piece, self._count, blocks)

    def _paths(self, pools: Sequence[PoolDescription]) -> list[tuple[Transfer, PoolDescription]]:
        """Who of us reads which of the peer's `pools`."""
        return [
            (transfer, pools[piece])
            for transfer, shares in zip(self._transfers, self._shares, strict=True)
            for piece, _ in shares
        ]


async def all_read(reads: Sequence[Coroutine[Any, Any, ReadReport]]) -> ReadReport:
    """What all reads together moved, once every one has ended. The first that fails ends the others."""
    started = time.monotonic()
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(read) for read in reads]
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return ReadReport(sum(task.result().bytes for task in running), time.monotonic() - started)


async def _to_the_end(copy: Callable[[], None]) -> None:
    """Run `copy` on a thread and wait for it even when cancelled: it writes to blocks until it has ended."""
    running = asyncio.ensure_future(asyncio.to_thread(copy))
    try:
        await asyncio.shield(running)
    finally:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])


def _batched(pairs: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    for at in range(0, len(pairs), size):
        yield pairs[at : at + size]
