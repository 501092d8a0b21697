"""KV read straight out of another process's memory through NIXL.

Two agents per worker, so the pool is registered with each exactly once: one that serves, with UCX's progress
thread asleep on its event descriptor, and one that reads (see `reader.py`), created with the first peer.

Over TCP, so between containers too, UCX emulates the read: the source sends the bytes. A limit of UCX 1.23
there: a source that was stopped or starved at the moment a reader of it vanished in a read can abort when it
goes on (4 of 30 when stopped with SIGSTOP; 0 of 34 when running, 20 of them on overloaded cores). It costs
that worker's process, as any crash of it does; no bytes go wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.device import device_of
from baton.kv.hashing import KvLayout
from baton.transfer.agent import Agent
from baton.transfer.base import (
    WARM_UP_BYTES,
    Pool,
    PoolDescription,
    ReadReport,
    Transfer,
    agent_name_of,
    require_blocks,
    require_compatible,
)
from baton.transfer.chunks import Chunk, chunks_of
from baton.transfer.reader import Reader


class NixlTransfer(Transfer):
    """See `Transfer`. Works between processes and hosts, for pools in CPU or GPU memory.

    A GPU pool should not be allocated with PyTorch's expandable segments: UCX cannot share those over NVLink
    and falls back to copying through the host. The source's kernels that wrote a block must have finished
    before a peer is told of it.
    """

    def __init__(self, storage: torch.Tensor, layout: KvLayout, worker_id: str, incarnation: str) -> None:
        self._pool = Pool.of(storage, layout)
        name = agent_name_of(worker_id, incarnation)
        with device_of(storage.device).current():  # UCX's CUDA transports use the thread's context
            self._server = Agent.serving(name, self._pool)
        self._description = self._pool.describe(worker_id, incarnation, self._server.metadata, "nixl")
        self._reader = Reader(name, self._pool)

    def describe(self) -> PoolDescription:
        return self._description

    async def add_peer(self, description: PoolDescription) -> None:
        require_compatible(self._description, description)
        await self._reader.add_peer(description)

    async def remove_peer(self, agent_name: str) -> None:
        await self._reader.remove_peer(agent_name)

    async def warm_up(self, agent_name: str, timeout_s: float) -> ReadReport:
        def plan(peer: PoolDescription, most: int) -> list[Chunk]:
            blocks = range(min(most, peer.total_blocks))
            return chunks_of(blocks, blocks, peer.layout.block_bytes, peer.side, self._reader.scratch)

        await self._reader.read(agent_name, lambda peer: plan(peer, 1), timeout_s, WARM_UP_BYTES)
        return await self._reader.read(
            agent_name, lambda peer: plan(peer, self._reader.scratch_blocks), timeout_s, WARM_UP_BYTES
        )

    async def read(
        self,
        agent_name: str,
        source_blocks: Sequence[int],
        destination_blocks: Sequence[int],
        timeout_s: float,
    ) -> ReadReport:
        def plan(peer: PoolDescription) -> list[Chunk]:
            require_blocks(self._pool.total_blocks, peer, source_blocks, destination_blocks)
            block_bytes = peer.layout.block_bytes
            return chunks_of(source_blocks, destination_blocks, block_bytes, peer.side, self._pool.side)

        size_bytes = len(source_blocks) * self._pool.layout.block_bytes
        return await self._reader.read(agent_name, plan, timeout_s, size_bytes)

    def close(self) -> None:
        self._reader.close()
        self._server.close()
