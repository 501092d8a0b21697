"""How a pool's description travels in `Kv.Connect`."""

from __future__ import annotations

from typing import cast

from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
from baton.rpc.v1 import worker_pb2
from baton.transfer.base import MemoryType, PoolDescription, TransportName


def layout_to_proto(layout: KvLayout) -> worker_pb2.KvLayout:
    return worker_pb2.KvLayout(
        model_fingerprint=layout.model_fingerprint,
        dtype=layout.dtype,
        block_size=layout.block_size,
        block_bytes=layout.block_bytes,
        format=layout.format,
    )


def layout_from_proto(message: worker_pb2.KvLayout) -> KvLayout:
    return KvLayout(
        model_fingerprint=message.model_fingerprint,
        dtype=message.dtype,
        block_size=message.block_size,
        block_bytes=message.block_bytes,
        format=message.format,
    )


def description_to_proto(description: PoolDescription) -> worker_pb2.ConnectResponse:
    return worker_pb2.ConnectResponse(
        incarnation=description.incarnation,
        agent_name=description.agent_name,
        agent_metadata=description.agent_metadata,
        layout=layout_to_proto(description.layout),
        pool_address=description.pool_address,
        total_blocks=description.total_blocks,
        device_id=description.device_id,
        memory_type=description.memory_type,
        transport=description.transport,
        shards=[description_to_proto(shard) for shard in description.shards],
    )


def description_from_proto(message: worker_pb2.ConnectResponse) -> PoolDescription:
    """Raises HandoffFailed when the peer speaks of memory or a transport that this version does not know."""
    if message.memory_type not in ("DRAM", "VRAM"):
        raise HandoffFailed(
            f"{message.agent_name} keeps KV in {message.memory_type!r}, known are DRAM and VRAM"
        )
    if message.transport not in ("nixl", "inprocess"):
        raise HandoffFailed(
            f"{message.agent_name} moves KV by {message.transport!r}, known are nixl and inprocess"
        )
    return PoolDescription(
        incarnation=message.incarnation,
        agent_name=message.agent_name,
        agent_metadata=message.agent_metadata,
        layout=layout_from_proto(message.layout),
        pool_address=message.pool_address,
        total_blocks=message.total_blocks,
        device_id=message.device_id,
        memory_type=cast(MemoryType, message.memory_type),
        transport=cast(TransportName, message.transport),
        shards=tuple(description_from_proto(shard) for shard in message.shards),
    )
