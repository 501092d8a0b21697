"""What is known of other workers, and what becomes of it when they are given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
from baton.rpc.server import Server
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.transfer import Transfer, create_transfer
from baton.transfer.wire import description_to_proto
from baton.worker.peers import Peer, Peers

LAYOUT = KvLayout("model", "int32", block_size=4, block_bytes=48, format="f")


def transfer(worker_id: str) -> Transfer:
    return create_transfer("inprocess", torch.zeros((200, 12), dtype=torch.int32), LAYOUT, worker_id, "1")


class SilentSource(worker_pb2_grpc.KvServicer):
    """Takes handoffs and says nothing."""

    def __init__(self, pool: Transfer) -> None:
        self._pool = pool
        self.begun = asyncio.Event()

    async def Connect(self, request: object, context: object) -> worker_pb2.ConnectResponse:
        return description_to_proto(self._pool.describe())

    async def Handoff(self, request_iterator: AsyncIterator[object], context: object) -> None:
        await anext(request_iterator)
        self.begun.set()
        await asyncio.Event().wait()


@asynccontextmanager
async def silent_peer() -> AsyncIterator[tuple[SilentSource, Peers, Peer]]:
    source = SilentSource(transfer("prefill-0"))
    peers = Peers("decode-0", transfer("decode-0"))
    async with Server() as server:
        server.add(worker_pb2_grpc.add_KvServicer_to_server, source, "baton.v1.Kv")
        address = f"127.0.0.1:{server.bind('127.0.0.1', 0, flag='port')}"
        await server.start()
        yield source, peers, await peers.get(address, "1")
        await peers.close()


async def wait_for_blocks(peer: Peer) -> None:
    with peer.handoff() as call:
        await call.write(worker_pb2.HandoffRequest(begin=worker_pb2.Begin()))
        await asyncio.wait_for(call.read(), 60)


async def test_a_handoff_fails_when_its_worker_is_given_up() -> None:
    async with silent_peer() as (source, peers, peer):
        handoff = asyncio.create_task(wait_for_blocks(peer))
        await source.begun.wait()
        await peers.forget(peer.address, peer.incarnation)
        with pytest.raises(HandoffFailed, match="given up meanwhile"):
            await handoff


async def test_a_handoff_that_is_cancelled_is_cancelled() -> None:
    async with silent_peer() as (source, _, peer):
        handoff = asyncio.create_task(wait_for_blocks(peer))
        await source.begun.wait()
        handoff.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handoff
