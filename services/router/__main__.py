"""The router process: `python -m services.router`."""

from __future__ import annotations

import asyncio
import gc
import os

import click
import uvloop

from baton import tracing
from baton.cli.options import settings_options
from baton.config import PROCESS_SECTIONS, Settings
from baton.logs import configure
from baton.process import allow_open_files, stop_on_signals
from baton.rpc.channels import use_internal_tls
from services.router.cluster import WatchedCluster
from services.router.router import Router


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    allow_open_files()
    stop = stop_on_signals()
    kvstore = settings.kvstore
    cluster = WatchedCluster(kvstore.kvstore, kvstore.worker_ttl_s, kvstore.index_max_bytes)
    router = Router(settings, cluster)
    cluster.listener = router
    router.metrics.kvstore_connected.set_function(lambda: cluster.connected)
    router.metrics.index_lag_s.set_function(lambda: cluster.lag_s)
    router.metrics.index_blocks.set_function(lambda: len(cluster.index))
    router.metrics.index_bytes.set_function(lambda: cluster.index.memory_bytes)
    router.metrics.index_evicted.set_function(lambda: cluster.index.evicted)
    # What was loaded at start stays: spare the garbage collector from looking at it again and again.
    gc.collect()
    gc.freeze()
    # A request makes a thousand objects and hardly a cycle: by default it would look at every one in flight.
    gc.set_threshold(50_000, 20, 100)
    await router.run(stop, asyncio.Event())


@click.command()
@settings_options(*PROCESS_SECTIONS["router"])
def main(settings: Settings) -> None:
    """Serve the OpenAI API and gRPC, and place requests on the cluster's workers."""
    configure("router", settings.observability.log_level, settings.observability.log_format)
    tracing.configure("router", settings.observability)
    use_internal_tls(settings.internal_tls)
    # Prompts come one by one: handing each to the tokenizer's thread pool costs more than it gains.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
