"""The kvstore process: `python -m services.kvstore`."""

from __future__ import annotations

import asyncio
import faulthandler
import logging

import click

from baton.addresses import join
from baton.cli.options import settings_options
from baton.config import PROCESS_SECTIONS, Settings
from baton.logs import configure
from baton.process import allow_open_files, serve_metrics, stop_on_signals
from baton.rpc.channels import use_internal_tls
from baton.rpc.probes import answer_probes
from baton.rpc.server import Server
from baton.rpc.v1 import kvstore_pb2_grpc
from services.kvstore.backend import Backend
from services.kvstore.memory import MemoryBackend
from services.kvstore.metrics import Metrics, RedisMetrics
from services.kvstore.reservations import ReservationsServicer
from services.kvstore.servicers import PrefixIndexServicer, RegistryServicer
from services.kvstore.state import ClusterState

log = logging.getLogger(__name__)

STOP_S = 15.0
"""How long stopping may take before the process ends at once; what Redis lacks then, workers tell again."""


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    allow_open_files()
    stop = stop_on_signals()

    chosen = settings.kvstore
    metrics = Metrics()
    backend = _backend(settings, metrics)
    state = ClusterState(backend, chosen.index_max_bytes)
    metrics.workers.set_function(lambda: len(state.members))
    metrics.blocks.set_function(lambda: sum(len(member.holdings) for member in state.members))
    metrics.index_bytes.set_function(lambda: state.index_bytes)
    metrics.forgotten_blocks.set_function(lambda: state.forgotten_blocks)
    metrics.subscribers.set_function(lambda: state.subscribers)
    reservations = ReservationsServicer()
    metrics.routers.set_function(lambda: reservations.routers)
    async with Server() as server:
        server.add(
            kvstore_pb2_grpc.add_RegistryServicer_to_server,
            RegistryServicer(state, metrics, chosen.worker_ttl_s),
            "baton.v1.Registry",
        )
        server.add(
            kvstore_pb2_grpc.add_PrefixIndexServicer_to_server,
            PrefixIndexServicer(state, metrics),
            "baton.v1.PrefixIndex",
        )
        server.add(kvstore_pb2_grpc.add_ReservationsServicer_to_server, reservations, "baton.v1.Reservations")
        port = server.bind(chosen.kvstore_host, chosen.kvstore_port, flag="--kvstore-port")
        metrics_host = settings.observability.metrics_host or chosen.kvstore_host
        metrics_server, _ = serve_metrics(metrics_host, settings.observability.metrics_port, metrics.registry)
        answer_probes(metrics_server, lambda: server.serving)
        state.restore(await backend.load())
        await server.start()
        await server.set_serving(True)
        address = join(chosen.kvstore_host, port)
        log.info("ready: gRPC on %s, metrics on port %d", address, metrics_server.server_port)
        async with asyncio.TaskGroup() as tasks:
            helpers = [
                tasks.create_task(backend.run()),
                tasks.create_task(_expire(state, chosen.worker_ttl_s)),
            ]
            await stop.wait()
            # The next one cannot listen before this one has ended. Whatever holds it up, the log will say it.
            faulthandler.dump_traceback_later(STOP_S, exit=True)
            state.close()
            await server.stop(0)
            for helper in helpers:
                helper.cancel()


def _backend(settings: Settings, metrics: Metrics) -> Backend:
    if not settings.kvstore.redis:
        return MemoryBackend()
    from services.kvstore.redis import RedisBackend  # an optional extra, so imported only when asked for

    return RedisBackend(settings.kvstore.redis, RedisMetrics(metrics.registry))


async def _expire(state: ClusterState, ttl_s: float) -> None:
    """Give the workers of an earlier process their time to join this one."""
    await asyncio.sleep(ttl_s)
    state.expire_unconfirmed()


@click.command()
@settings_options(*PROCESS_SECTIONS["kvstore"])
def main(settings: Settings) -> None:
    """Serve the worker registry and the prefix index."""
    configure("kvstore", settings.observability.log_level, settings.observability.log_format)
    use_internal_tls(settings.internal_tls)
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
