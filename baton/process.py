"""What every process that serves does alike: hold many connections, stop when asked to, show its metrics."""

from __future__ import annotations

import asyncio
import resource
import signal
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from baton.addresses import join
from baton.config import BadSetting

OPEN_FILES = 65_536
"""How many a process asks for, connections included, if its hard limit lets it."""


def allow_open_files() -> None:
    """Raise the limit of open files, which shells set low for the sake of programs older than `poll`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def stop_on_signals() -> asyncio.Event:
    """What SIGTERM and SIGINT set from now on; call it on the event loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def serve_metrics(host: str, port: int, registry: CollectorRegistry = REGISTRY) -> tuple[WSGIServer, Thread]:
    """Serve /metrics from a thread of its own.

    Raises:
        BadSetting: the port is taken.
    """
    try:
        return start_http_server(port, host, registry)
    except OSError as error:
        raise BadSetting(
            f"cannot serve metrics on {join(host, port)}: {error}; choose another --metrics-port",
            field="metrics_port",
        ) from error
