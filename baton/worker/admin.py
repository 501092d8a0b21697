"""WorkerAdmin: what a worker says of itself, role changes, drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from baton.rpc.kvstore_messages import ROLE_NUMBERS, ROLES
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.transfer.wire import layout_to_proto
from baton.worker.convert import load_to
from baton.worker.metrics import DRAINS
from baton.worker.peers import Peers
from baton.worker.role import LONGEST_S, RoleKeeper
from baton.worker.state import WorkerState

# For routers to read their last outputs, after which a worker that leaves hangs up.
_GOODBYE_S = 2.0


class AdminService(worker_pb2_grpc.WorkerAdminServicer):
    """`announce` is called when this worker drains, which the registry must know."""

    def __init__(
        self, state: WorkerState, peers: Peers, roles: RoleKeeper, announce: Callable[[], None]
    ) -> None:
        self._state = state
        self._peers = peers
        self._roles = roles
        self._announce = announce

    async def Status(
        self, request: worker_pb2.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.StatusResponse:
        state, load = self._state, self._state.engine.load()
        return worker_pb2.StatusResponse(
            worker_id=state.worker_id,
            incarnation=state.incarnation,
            role=ROLE_NUMBERS[state.role],
            draining=state.draining,
            load=load_to(load, state.layout.block_bytes),
            layout=layout_to_proto(state.layout),
            sessions=state.sessions,
            handoffs_serving=state.handoffs_serving,
            handoffs_reading=state.handoffs_reading,
            pinned_blocks=load.pinned_blocks,
            tasks=len(asyncio.all_tasks()),
            kv_transfer_bytes=self._peers.read_bytes,
            attention_backend=state.attention_backend,
            transfer_backend=state.transfer.describe().transport,
            metrics_address=state.metrics_address,
        )

    async def SetRole(
        self, request: worker_pb2.SetRoleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.SetRoleResponse:
        if request.role not in ROLES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"role: {request.role} is not a role")
        if not 0 <= request.for_s <= LONGEST_S:
            message = f"for_s: {request.for_s:g} is not between 0 and {LONGEST_S:g} seconds"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        previous = self._state.role
        self._roles.give(ROLES[request.role], request.for_s)
        return worker_pb2.SetRoleResponse(previous=ROLE_NUMBERS[previous])

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainResponse:
        return worker_pb2.DrainResponse(
            unfinished=await drain(self._state, self._announce, request.timeout_s)
        )


async def drain(state: WorkerState, announce: Callable[[], None], timeout_s: float) -> int:
    """Refuse new work and wait until what there is has moved away or ended; how many requests are left."""
    state.drain()
    announce()
    try:
        async with asyncio.timeout(timeout_s):
            while _unfinished(state):  # noqa: ASYNC110 - the engine's thread has no event to wait for
                await asyncio.sleep(0.05)
    except TimeoutError:
        pass
    unfinished = _unfinished(state)
    DRAINS.labels("unfinished" if unfinished else "done").inc()
    return unfinished


async def end_sessions(state: WorkerState) -> None:
    """Let routers read to the end what they were sent, and close their sessions."""
    for session in list(state.routers.values()):
        session.end()
    with suppress(TimeoutError):
        async with asyncio.timeout(_GOODBYE_S):
            while state.sessions:  # noqa: ASYNC110 - each ends with a call of its own
                await asyncio.sleep(0.01)


def _unfinished(state: WorkerState) -> int:
    load = state.engine.load()
    return load.running + load.waiting + state.handoffs_serving + state.handoffs_reading
