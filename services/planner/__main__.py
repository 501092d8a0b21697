"""The planner process: `python -m services.planner`."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import click
from kubernetes.aio.client import ApiClient
from kubernetes.aio.config import load_incluster_config

from baton.cli.options import settings_options
from baton.config import PROCESS_SECTIONS, PlannerSettings, Settings
from baton.logs import configure
from baton.process import serve_metrics, stop_on_signals
from baton.routing import Role
from baton.rpc.channels import use_internal_tls
from baton.rpc.registry_watch import RegistryWatch
from services.planner.demand import Routers
from services.planner.leader import Alone, Leadership, LeaseLeadership
from services.planner.metrics import Metrics
from services.planner.planner import Planner, Reach
from services.planner.workloads import Deployments

log = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = stop_on_signals()
    chosen = settings.planner
    metrics = Metrics()
    metrics_host = settings.observability.metrics_host or chosen.planner_host
    server, _ = serve_metrics(metrics_host, settings.observability.metrics_port, metrics.registry)
    registry = RegistryWatch(settings.kvstore.kvstore, ttl_s=settings.kvstore.worker_ttl_s)
    async with aiohttp.ClientSession() as session, _cluster(chosen) as (workloads, leadership):
        reach = Reach(registry, Routers(chosen.router_metrics, session), workloads, leadership)
        log.info("planning%s: metrics on port %d", ", dry run" if chosen.dry_run else "", server.server_port)
        async with asyncio.TaskGroup() as tasks:
            helpers = [
                tasks.create_task(registry.run()),
                tasks.create_task(leadership.run()),
                tasks.create_task(Planner(chosen, reach, metrics).run()),
            ]
            await stop.wait()
            for helper in helpers:
                helper.cancel()


@asynccontextmanager
async def _cluster(settings: PlannerSettings) -> AsyncIterator[tuple[Deployments | None, Leadership]]:
    """What can be scaled, and who may: on Kubernetes, where the settings name its objects, else nothing."""
    names = {Role.PREFILL: settings.prefill_workload, Role.DECODE: settings.decode_workload}
    names = {role: name for role, name in names.items() if name}
    if not names:
        yield None, Alone()
        return
    identity = socket.gethostname() + f"-{os.getpid()}"
    load_incluster_config()  # type: ignore[no-untyped-call]
    async with ApiClient() as client:
        leadership: Leadership = Alone()
        if settings.lease:
            leadership = LeaseLeadership(client, settings.namespace, settings.lease, identity)
        yield Deployments(client, settings.namespace, names, identity), leadership


@click.command()
@settings_options(*PROCESS_SECTIONS["planner"])
def main(settings: Settings) -> None:
    """Keep the number of workers and their roles right."""
    configure("planner", settings.observability.log_level, settings.observability.log_format)
    use_internal_tls(settings.internal_tls)
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
