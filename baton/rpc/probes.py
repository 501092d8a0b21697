"""Is the process alive, and does it serve? Over plain HTTP, beside its metrics.

Whoever starts and stops processes asks: gRPC's own health service answers the same, but only those who have a
certificate where connections between processes need one, and Kubernetes has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIServer

_LOOP_TIMEOUT_S = 5.0


def answer_probes(server: WSGIServer, serving: Callable[[], bool]) -> None:
    """Let the HTTP server of the metrics also answer /live and /ready; call it on the event loop.

    /live is 200 while the loop turns, /ready while `serving`, asked on the loop, says so; else both are 503.
    """
    metrics = server.get_app()
    loop = asyncio.get_running_loop()
    assert metrics is not None

    async def ask(path: str) -> bool:
        return path == "/live" or serving()

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path not in ("/live", "/ready"):
            return metrics(environ, start_response)
        asked = asyncio.run_coroutine_threadsafe(ask(path), loop)
        try:
            good = asked.result(_LOOP_TIMEOUT_S)
        except (TimeoutError, asyncio.CancelledError):
            asked.cancel()
            good = False
        start_response("200 OK" if good else "503 Service Unavailable", [("content-type", "text/plain")])
        return [b"ok\n" if good else b"not now\n"]

    server.set_app(answer)
