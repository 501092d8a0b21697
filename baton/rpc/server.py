"""How a process serves gRPC: shared options, health, reflection, binding, graceful stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.addresses import join
from baton.config import BadSetting
from baton.rpc.channels import SHARED_OPTIONS, internal_credentials

Servicer = TypeVar("Servicer")

log = logging.getLogger(__name__)

_STOP_S = 5.0
"""For how long calls that were cancelled may take to end before they are left behind."""

_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *SHARED_OPTIONS,
    # Peers ping every 10 s; without these the server would call that abuse and hang up.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


@dataclass(frozen=True)
class Public:
    """How a server meets clients: `credentials` None means in the clear; `max_message_bytes` is the largest
    message it takes."""

    credentials: grpc.ServerCredentials | None
    max_message_bytes: int


class Server:
    """A grpc.aio server with health and reflection on.

    `add` the services, `bind`, `start`; every service reports NOT_SERVING until `set_serving(True)`.
    `serving` is what health says of the process as a whole. As an async context manager it stops on exit
    without grace. Create it inside a running event loop.
    """

    def __init__(self, public: Public | None = None, *, share_ports: bool = False) -> None:
        """`public`: the server is there for clients, not for the other processes of the cluster.
        `share_ports`: other processes that also say so may listen on the same port (SO_REUSEPORT)."""
        # gRPC's own default would let a second process share the port silently instead of failing.
        options = {**dict(_SERVER_OPTIONS), "grpc.so_reuseport": int(share_ports)}
        if public is not None:
            options["grpc.max_receive_message_length"] = public.max_message_bytes
        self._credentials = public.credentials if public is not None else internal_credentials()
        self._grpc = grpc.aio.server(options=tuple(options.items()))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._services: list[str] = []
        self.serving = False
        self._stopping = False
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)

    def add(self, add_to_server: Callable[[Servicer, Any], None], servicer: Servicer, service: str) -> None:
        """Serve `servicer`.

        Args:
            add_to_server: the generated function, such as `worker_pb2_grpc.add_KvServicer_to_server`.
            service: its full name, such as `baton.v1.Kv`.
        """
        add_to_server(servicer, self._grpc)
        self._services.append(service)

    def bind(self, host: str, port: int, *, flag: str) -> int:
        """Listen on host:port and return the real port, which matters when `port` is 0.

        Args:
            flag: the flag that chose the port, such as `--worker-port`, for the message.

        Raises:
            BadSetting: the port is taken, or the host is not an address of this machine.
        """
        address = join(host, port)
        try:
            if self._credentials is not None:
                return self._grpc.add_secure_port(address, self._credentials)
            return self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise BadSetting(
                f"cannot listen on {address} ({flag}): the port is in use or the address is not this "
                f"machine's; choose another {flag}",
                field=flag.removeprefix("--").replace("-", "_"),
            ) from error

    async def start(self) -> None:
        """Accept calls. Health answers NOT_SERVING for every service and for the process as a whole."""
        await self.set_serving(False)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        await self._grpc.start()

    async def set_serving(self, serving: bool, *services: str) -> None:
        """Set what health says of `services`; without names, of every service and the process ("")."""
        status = health_pb2.HealthCheckResponse
        if not services:
            self.serving = serving
        for service in services or ("", *self._services):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse new calls, and cancel the calls still running after `grace_s` seconds."""
        if self._stopping:
            return
        self._stopping = True
        self.serving = False
        await self._health.enter_graceful_shutdown()
        ending = asyncio.create_task(self._grpc.stop(grace_s))
        done, _ = await asyncio.wait({ending}, timeout=grace_s + _STOP_S)
        if done:
            ending.result()
        else:
            ending.cancel()
            log.warning("gRPC has not stopped in %.0f s: its calls are left behind", grace_s + _STOP_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(0)
