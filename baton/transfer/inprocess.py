"""KV copied between pools of one process: for platforms without NIXL, chosen by name only."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import torch

from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
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

logger = logging.getLogger(__name__)

BLOCKS_PER_COPY = 64
"""Blocks copied before the loop, a deadline or a cancel is looked at again."""

_pools: dict[str, Pool] = {}
"""Every open pool of this process by agent name; each InProcessTransfer owns its own entry."""


class InProcessTransfer(Transfer):
    """See `Transfer`. Peers in other processes are refused."""

    def __init__(self, storage: torch.Tensor, layout: KvLayout, worker_id: str, incarnation: str) -> None:
        self._pool = Pool.of(storage, layout)
        self._name = agent_name_of(worker_id, incarnation)
        self._peers: dict[str, PoolDescription] = {}
        self._description = self._pool.describe(worker_id, incarnation, b"", "inprocess")
        self._closed = False
        _pools[self._name] = self._pool
        logger.warning(
            "KV moves by copies within this process only: workers in other processes cannot be read"
        )

    def describe(self) -> PoolDescription:
        return self._description

    async def add_peer(self, description: PoolDescription) -> None:
        require_compatible(self._description, description)
        if description.agent_name not in _pools:
            raise HandoffFailed(
                f"{description.agent_name} is not in this process; start the workers with --transfer nixl"
            )
        for name, peer in list(self._peers.items()):
            if peer.worker_id == description.worker_id and peer != description:
                await self.remove_peer(name)
        self._peers[description.agent_name] = description

    async def remove_peer(self, agent_name: str) -> None:
        self._peers.pop(agent_name, None)

    async def warm_up(self, agent_name: str, timeout_s: float) -> ReadReport:
        started = time.monotonic()
        pool, _ = self._source(agent_name)
        blocks = pool.storage[: max(1, WARM_UP_BYTES // pool.layout.block_bytes)].clone()
        return ReadReport(blocks.nbytes, time.monotonic() - started)

    async def read(
        self,
        agent_name: str,
        source_blocks: Sequence[int],
        destination_blocks: Sequence[int],
        timeout_s: float,
    ) -> ReadReport:
        started = time.monotonic()
        _, peer = self._source(agent_name)
        require_blocks(self._pool.total_blocks, peer, source_blocks, destination_blocks)
        for at in range(0, len(source_blocks), BLOCKS_PER_COPY):
            pool, _ = self._source(agent_name)  # it may have closed since the last copy
            part = slice(at, at + BLOCKS_PER_COPY)
            there, here = pool.storage.flatten(1), self._pool.storage.flatten(1)
            blocks = there[torch.tensor(source_blocks[part], device=there.device)]
            here[torch.tensor(destination_blocks[part], device=here.device)] = blocks.to(here.device)
            await asyncio.sleep(0)
            if time.monotonic() - started > timeout_s:
                raise HandoffFailed(f"{agent_name} did not deliver within {timeout_s:.1f} s")
        moved = len(source_blocks) * self._pool.layout.block_bytes
        return ReadReport(moved, time.monotonic() - started)

    def close(self) -> None:
        self._closed = True
        del _pools[self._name]

    def _source(self, agent_name: str) -> tuple[Pool, PoolDescription]:
        if self._closed:
            raise HandoffFailed("this worker is stopping")
        peer = self._peers.get(agent_name)
        if peer is None:
            raise HandoffFailed(f"{agent_name} is not a peer of this worker, or no longer")
        pool = _pools.get(agent_name)
        if pool is None:
            raise HandoffFailed(f"{agent_name} has stopped")
        return pool, peer
