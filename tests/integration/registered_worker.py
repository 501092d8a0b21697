"""A process that does nothing but be a worker of the registry: `ADDRESS WORKER_ID INCARNATION BLOCKS`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from baton.kv.events import Event, Stored
from baton.rpc.kvstore_client import WorkerMembership
from baton.rpc.v1 import kvstore_pb2, worker_pb2


async def main(address: str, worker_id: str, incarnation: str, blocks: int) -> None:
    async def snapshot() -> Sequence[Event]:
        return [Stored([number.to_bytes(16, "big") for number in range(blocks)])]

    worker = kvstore_pb2.Worker(
        worker_id=worker_id,
        incarnation=incarnation,
        address="127.0.0.1:1",
        role=worker_pb2.ROLE_DECODE,
        total_blocks=blocks,
    )
    await WorkerMembership(address, worker, snapshot).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
