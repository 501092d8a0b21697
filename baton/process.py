"""What every process that serves does alike: stop when it is asked to, show its metrics."""

from __future__ import annotations

import asyncio
import signal
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from baton.addresses import join
from baton.config import BadSetting


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
