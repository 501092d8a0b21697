"""How KV blocks get from one worker's pool into another's: `create_transfer` and what it returns.

`nixl` (the default) reads the other worker's memory over whatever the two share: RDMA, NVLink, shared memory
or TCP. `inprocess` copies between pools of one process, for platforms without NIXL wheels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from baton.kv.hashing import KvLayout
from baton.transfer.base import PoolDescription, ReadReport, Transfer

if TYPE_CHECKING:
    import torch

__all__ = ["PoolDescription", "ReadReport", "Transfer", "create_transfer"]


def create_transfer(
    name: Literal["nixl", "inprocess"],
    storage: torch.Tensor,
    layout: KvLayout,
    worker_id: str,
    incarnation: str,
) -> Transfer:
    """Make the pool readable by other workers and able to read theirs.

    `storage` is the whole KV pool, contiguous, its first axis the block id, one block being
    `layout.block_bytes` bytes; it must stay allocated until `Transfer.close`. `incarnation` is new at every
    start of the worker process. Takes up to a second: call it while the worker starts.

    Raises:
        ValueError: `storage` does not have that shape.
        TransferUnavailable: NIXL cannot be loaded or cannot register the pool; the message says what to do.
    """
    if name == "inprocess":
        from baton.transfer.inprocess import InProcessTransfer

        return InProcessTransfer(storage, layout, worker_id, incarnation)
    from baton.transfer.nixl import NixlTransfer

    return NixlTransfer(storage, layout, worker_id, incarnation)
