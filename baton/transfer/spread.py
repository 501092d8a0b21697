"""The transfer of a worker whose KV is in one pool or in several, one for each device of its model.

Between workers on as many devices, pool reads from pool, byte for byte. Otherwise whole pieces of the peer's
blocks are read into a staging pool, as few and large ranges, and dealt out by heads from there; so each
byte is read once, whatever the two numbers are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import torch

from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
from baton.transfer.base import (
    PoolDescription,
    ReadReport,
    Transfer,
    agent_name_of,
    require_blocks,
    require_compatible,
)
from baton.transfer.pieces import Pieces
from baton.transfer.staging import Create, Staging, all_read
from baton.transfer.verify import digests_of


class SpreadTransfer(Transfer):
    """See `Transfer`. Block n of the worker is block n of each of its pools.

    Args:
        storages: the pools in order of the heads they have, each as `create_transfer` takes them.
        layout: of whole blocks.
    """

    def __init__(
        self,
        create: Create,
        storages: Sequence[torch.Tensor],
        layout: KvLayout,
        worker_id: str,
        incarnation: str,
    ) -> None:
        self._create, self._worker_id, self._incarnation = create, worker_id, incarnation
        self._pieces = Pieces(storages, layout)
        count = len(storages)
        ids = [worker_id] if count == 1 else [f"{worker_id}.{number}" for number in range(count)]
        self._pools = [
            create(storage, self._pieces.layout_of(count), one, incarnation)
            for storage, one in zip(storages, ids, strict=True)
        ]
        self._description = self._described([pool.describe() for pool in self._pools])
        #: By into how many pieces the peers cut their blocks.
        self._stagings: dict[int, Staging] = {}
        self._staging = asyncio.Lock()
        self._peers: dict[str, PoolDescription] = {}

    def describe(self) -> PoolDescription:
        return self._description

    def digests(self, blocks: Sequence[int]) -> list[bytes]:
        """Of whole blocks, so that they are the same however heads are spread."""
        if len(self._pools) == 1:
            return self._pools[0].digests(blocks)
        return [digest for block in blocks for digest in digests_of(self._pieces.whole(block), [0])]

    async def add_peer(self, description: PoolDescription) -> None:
        require_compatible(self._description, description)
        theirs = description.pools
        for pool in theirs:
            fits = pool.layout == self._pieces.layout_of(len(theirs))
            if not fits or pool.total_blocks != description.total_blocks:
                raise HandoffFailed(f"{pool.agent_name} is not a part of {description.agent_name}'s pool")
        for name, known in list(self._peers.items()):
            if known.worker_id == description.worker_id and known != description:
                await self.remove_peer(name)
        staging = None if len(theirs) == len(self._pools) else await self._staged(len(theirs))
        self._peers[description.agent_name] = description
        try:
            if staging is not None:
                await staging.add_peer(theirs)
            else:
                for ours, pool in zip(self._pools, theirs, strict=True):
                    await ours.add_peer(pool)
        except BaseException:
            await self.remove_peer(description.agent_name)  # whichever of its pools was there already
            raise

    async def remove_peer(self, agent_name: str) -> None:
        peer = self._peers.pop(agent_name, None)
        if peer is None:
            return
        if len(peer.pools) == len(self._pools):
            for ours, pool in zip(self._pools, peer.pools, strict=True):
                await ours.remove_peer(pool.agent_name)
        else:
            await self._stagings[len(peer.pools)].remove_peer(peer.pools)

    async def warm_up(self, agent_name: str, timeout_s: float) -> ReadReport:
        peer = self._peer(agent_name)
        if len(peer.pools) != len(self._pools):
            return await self._stagings[len(peer.pools)].warm_up(peer.pools, timeout_s)
        return await self._by_pool(peer, lambda ours, name: ours.warm_up(name, timeout_s))

    async def read(
        self,
        agent_name: str,
        source_blocks: Sequence[int],
        destination_blocks: Sequence[int],
        timeout_s: float,
    ) -> ReadReport:
        peer = self._peer(agent_name)
        if len(peer.pools) != len(self._pools):
            staging = self._stagings[len(peer.pools)]
            require_blocks(self._pieces.storages[0].shape[0], peer, source_blocks, destination_blocks)
            return await staging.read(peer.pools, source_blocks, destination_blocks, timeout_s)
        return await self._by_pool(
            peer, lambda ours, name: ours.read(name, source_blocks, destination_blocks, timeout_s)
        )

    def close(self) -> None:
        for staging in self._stagings.values():
            staging.close()
        for pool in self._pools:
            pool.close()

    async def _by_pool(
        self, peer: PoolDescription, read: Callable[[Transfer, str], Coroutine[Any, Any, ReadReport]]
    ) -> ReadReport:
        """Read pool from pool, all at once."""
        if len(self._pools) == 1:
            return await read(self._pools[0], peer.agent_name)
        pairs = zip(self._pools, peer.pools, strict=True)
        return await all_read([read(ours, theirs.agent_name) for ours, theirs in pairs])

    async def _staged(self, count: int) -> Staging:
        """The staging for blocks in `count` pieces; made when the first peer has them, as it takes memory."""
        async with self._staging:
            if count not in self._stagings:
                name = f"{self._worker_id}.of-{count}"
                self._stagings[count] = await asyncio.to_thread(
                    Staging, self._create, self._pieces, count, name, self._incarnation
                )
            return self._stagings[count]

    def _peer(self, agent_name: str) -> PoolDescription:
        peer = self._peers.get(agent_name)
        if peer is None:
            raise HandoffFailed(f"{agent_name} is not a peer of this worker, or no longer")
        return peer

    def _described(self, pools: Sequence[PoolDescription]) -> PoolDescription:
        if len(pools) == 1:
            return pools[0]
        return replace(
            pools[0],
            agent_name=agent_name_of(self._worker_id, self._incarnation),
            agent_metadata=b"",
            layout=self._pieces.layout,
            pool_address=0,
            device_id=0,
            shards=tuple(pools),
        )
