"""Is each process of a cluster ready, and at which address?"""

from __future__ import annotations

import asyncio
import http.client

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.rpc.channels import open_channel, open_public_channel
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc

_CALL_TIMEOUT_S = 2.0
_RETRY_S = 0.1


class Readiness:
    """What the processes say of themselves: gRPC health, the registry for where workers listen, and
    the router's `/ready`. Each method answers the address once the process takes work, else None."""

    def __init__(self, kvstore: str) -> None:
        """`kvstore` is the address (host:port) of the cluster's registry."""
        self._kvstore = kvstore
        self._workers: dict[str, str] = {}

    async def follow_registry(self) -> None:
        """Keep the workers' addresses current, across restarts of the kvstore; runs until cancelled."""
        while True:
            try:
                async with open_channel(self._kvstore) as channel:
                    stub = kvstore_pb2_grpc.RegistryStub(channel)
                    async for update in stub.Watch(kvstore_pb2.WatchRequest()):
                        if update.snapshot:
                            self._workers.clear()
                        for change in update.changes:
                            if change.gone:
                                self._workers.pop(change.worker.worker_id, None)
                            elif change.worker.address:
                                self._workers[change.worker.worker_id] = change.worker.address
            except grpc.aio.AioRpcError:
                pass  # it is still starting, or restarting
            await asyncio.sleep(_RETRY_S)

    async def kvstore(self) -> str | None:
        return self._kvstore if await serving(self._kvstore) else None

    async def worker(self, worker_id: str) -> str | None:
        address = self._workers.get(worker_id)
        return address if address and await serving(address) else None

    async def router(self, base_url: str, grpc_address: str, own_address: str) -> str | None:
        """Ready when it could place a request and the gRPC front serves. Several routers may share the
        first two addresses; `own_address` reaches this one."""
        status = await asyncio.to_thread(http_status, own_address, "/ready")
        # Under TLS nobody here need trust the certificate; gRPC serves before a router says ready.
        if status != 200 or not (
            base_url.startswith("https") or await _healthy(open_public_channel(grpc_address))
        ):
            return None
        return f"{base_url}\n{grpc_address} (gRPC)\n{own_address} (metrics)"


async def serving(address: str) -> bool:
    """Whether the gRPC server at `address` (host:port), a process of the cluster's own, says it serves."""
    return await _healthy(open_channel(address))


async def _healthy(opened: grpc.aio.Channel) -> bool:
    try:
        async with opened as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_CALL_TIMEOUT_S
            )
    except grpc.aio.AioRpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def http_status(address: str, path: str) -> int | None:
    """Status of GET `path` at `address` (host:port); None when nobody answers. Blocks."""
    connection = http.client.HTTPConnection(address, timeout=_CALL_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
