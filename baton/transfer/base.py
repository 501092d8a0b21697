"""What the worker asks of a transfer: describe my pool, know a peer's, read blocks from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from baton.errors import BatonError, HandoffFailed
from baton.kv.hashing import KvLayout
from baton.transfer.verify import digests_of

if TYPE_CHECKING:
    import torch

MemoryType = Literal["DRAM", "VRAM"]
TransportName = Literal["nixl", "inprocess"]


class TransferUnavailable(BatonError):
    """The chosen transfer cannot work on this machine; raised at start, the message says what to do."""


@dataclass(frozen=True)
class Side:
    """One end of a read: where block 0 is in the memory of its process. `device_id` is 0 for DRAM."""

    address: int
    device_id: int
    memory_type: MemoryType


@dataclass(frozen=True)
class PoolDescription:
    """What a reader must know of a pool, valid for one incarnation of its worker.

    `agent_name` is `agent_name_of(worker_id, incarnation)`; `pool_address` is that of block 0 in the worker's
    memory; `device_id` is the CUDA device index for VRAM and 0 for DRAM.

    A worker whose model is spread over devices has a pool on each, with some heads of every block. `shards`
    describes them in order, and `layout` whole blocks; address and metadata are then those of nothing.
    """

    incarnation: str
    agent_name: str
    agent_metadata: bytes
    layout: KvLayout
    pool_address: int
    total_blocks: int
    device_id: int
    memory_type: MemoryType
    transport: TransportName
    shards: tuple[PoolDescription, ...] = ()

    @property
    def pools(self) -> tuple[PoolDescription, ...]:
        """The pools that can be read: one for each device."""
        return self.shards or (self,)

    @property
    def worker_id(self) -> str:
        """The stable name of the worker: the same for every incarnation."""
        return self.agent_name.removesuffix("/" + self.incarnation)

    @property
    def side(self) -> Side:
        return Side(self.pool_address, self.device_id, self.memory_type)


def agent_name_of(worker_id: str, incarnation: str) -> str:
    """A restarted worker never has the name of the one before: peers of both would confuse them."""
    return f"{worker_id}/{incarnation}"


@dataclass(frozen=True)
class ReadReport:
    """What one read moved, and how long it took from the call to the last byte."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Pool:
    """The worker's own pool as addresses. Use `Pool.of`."""

    storage: torch.Tensor
    layout: KvLayout
    side: Side
    total_blocks: int

    @classmethod
    def of(cls, storage: torch.Tensor, layout: KvLayout) -> Pool:
        """Raises ValueError when `storage` is not contiguous blocks of `layout.block_bytes` bytes."""
        if storage.dim() == 0 or not storage.is_contiguous():
            raise ValueError("the KV pool must be a contiguous tensor whose first axis is the block id")
        total_blocks = storage.shape[0]
        expected = total_blocks * layout.block_bytes
        if total_blocks == 0 or storage.nbytes != expected:
            raise ValueError(
                f"a KV pool of {total_blocks} blocks of {layout.block_bytes} bytes has {expected} bytes, "
                f"got {storage.nbytes}"
            )
        return cls(storage, layout, side_of(storage), total_blocks)

    @property
    def size_bytes(self) -> int:
        return self.total_blocks * self.layout.block_bytes

    def describe(
        self, worker_id: str, incarnation: str, agent_metadata: bytes, transport: TransportName
    ) -> PoolDescription:
        return PoolDescription(
            incarnation=incarnation,
            agent_name=agent_name_of(worker_id, incarnation),
            agent_metadata=agent_metadata,
            layout=self.layout,
            pool_address=self.side.address,
            total_blocks=self.total_blocks,
            device_id=self.side.device_id,
            memory_type=self.side.memory_type,
            transport=transport,
        )


def side_of(storage: torch.Tensor) -> Side:
    if storage.is_cuda:
        return Side(storage.data_ptr(), storage.get_device(), "VRAM")
    return Side(storage.data_ptr(), 0, "DRAM")


def require_compatible(ours: PoolDescription, theirs: PoolDescription) -> None:
    """Raises HandoffFailed unless blocks of `theirs` are, byte for byte, blocks of `ours`."""
    if ours.transport != theirs.transport:
        raise HandoffFailed(
            f"{theirs.agent_name} moves KV by {theirs.transport!r} and this worker by {ours.transport!r}; "
            "start both with the same --transfer"
        )
    for item in fields(KvLayout):
        here, there = getattr(ours.layout, item.name), getattr(theirs.layout, item.name)
        if here != there:
            raise HandoffFailed(
                f"KV of {theirs.agent_name} cannot be used here: its {item.name} is {there!r}, "
                f"this worker's is {here!r}"
            )


def require_blocks(
    our_blocks: int, theirs: PoolDescription, source_blocks: Sequence[int], destination_blocks: Sequence[int]
) -> None:
    """Check the block ids of a read into a pool of `our_blocks` before any address is made of them.

    Raises:
        ValueError: this worker is wrong: the lists differ in length or a destination is outside the pool.
        HandoffFailed: the peer is wrong: it named a block that it does not have.
    """
    if len(source_blocks) != len(destination_blocks):
        raise ValueError(
            f"{len(source_blocks)} source blocks for {len(destination_blocks)} destination blocks"
        )
    if not source_blocks:
        return
    if min(destination_blocks) < 0 or max(destination_blocks) >= our_blocks:
        raise ValueError(f"a destination block is outside the pool of {our_blocks} blocks")
    if min(source_blocks) < 0 or max(source_blocks) >= theirs.total_blocks:
        raise HandoffFailed(
            f"{theirs.agent_name} named block {max(source_blocks)} and has {theirs.total_blocks} blocks"
        )


class Transfer(ABC):
    """One worker's end of every KV transfer. Use it from one asyncio loop.

    Serving needs no call: from construction to `close`, peers that know `describe()` can read the pool, and
    what of that needs this process's help happens on a thread that sleeps until a peer asks.
    """

    _pool: Pool

    @abstractmethod
    def describe(self) -> PoolDescription:
        """This worker's pool, for its peers. The same value every time; costs nothing."""

    def digests(self, blocks: Sequence[int]) -> list[bytes]:
        """BLAKE2b of the content of blocks of this worker's pool; see `digests_of`. Blocks."""
        return digests_of(self._pool.storage, blocks)

    @abstractmethod
    async def add_peer(self, description: PoolDescription) -> None:
        """Make `read` from this pool possible. Adding the same description again changes nothing.

        Any other incarnation of the same worker is removed first, with its running reads failed.

        Raises:
            HandoffFailed: the pools differ (the message names the field and both values), or the peer's
                metadata is unusable or no path leads to it.
        """

    @abstractmethod
    async def remove_peer(self, agent_name: str) -> None:
        """Forget a peer; its running reads fail first. Unknown names are ignored."""

    @abstractmethod
    async def warm_up(self, agent_name: str, timeout_s: float) -> ReadReport:
        """Really read from the peer, into no block of ours, so that the first request does not pay for
        setting the connection up: one block for that, then up to `WARM_UP_BYTES`, which are reported.

        Raises:
            HandoffFailed: as `read`.
        """

    @abstractmethod
    async def read(
        self,
        agent_name: str,
        source_blocks: Sequence[int],
        destination_blocks: Sequence[int],
        timeout_s: float,
    ) -> ReadReport:
        """Copy block `source_blocks[i]` of the peer into our `destination_blocks[i]`, for every i.

        However this ends, by return, exception or cancellation, nothing writes the destination blocks any
        more once it has: the caller may free them. Ending early therefore waits for what is already on the
        wire, about `DRAIN_S` at most. The content of the destination is valid only after a return, and only
        if the source still held the blocks then (that is the Handoff's business).

        Raises:
            HandoffFailed: `timeout_s` passed, the peer is unknown, gone or unreachable, or it named a block
                that it does not have.
            ValueError: the block lists do not fit each other or our pool.
        """

    @abstractmethod
    def close(self) -> None:
        """Fail running reads, stop serving and let go of the pool. Call once; takes a few seconds at most.

        Peers that are reading get an error or the bytes; both are safe while the pool stays allocated.
        """


WARM_UP_BYTES = 4 * 1024 * 1024
"""What a warm-up reads to see how fast the connection is: about a millisecond over shared memory."""

DRAIN_S = 2.0
"""Seconds a read that ends early waits for bytes already asked for, before the connection is torn down."""
