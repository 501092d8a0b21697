"""What the page at /ui is made of: its files, the cluster now, and what became of one request."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qs

import msgspec

from baton import __version__
from baton.cluster_now import Choices, ClusterNow, FlowNow, Requests, WorkerNow
from baton.errors import InvalidRequest
from baton.routing import WorkerView
from services.router.cluster import Cluster, KnownWorker
from services.router.frontend import Frontend
from services.router.http import Exchange, NotFound
from services.router.timeline import Recent

Handler = Callable[[Exchange], Awaitable[None]]

_FOLDER = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # Nothing comes from elsewhere and nothing is inline: what a model writes cannot become script.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}
_SHOWN_REQUESTS = 12


class Page:
    """Answers what is under /ui. Prompts and answers are not kept, so none are told."""

    def __init__(self, frontend: Frontend, recent: Recent, cluster: Cluster, policy: str) -> None:
        self._frontend = frontend
        self._recent = recent
        self._cluster = cluster
        self._policy = policy

    def routes(self) -> Mapping[str, Mapping[str, Handler]]:
        """Paths and methods, as the app keeps them."""
        files = {f"/ui/{path.name}": {"GET": _file(path)} for path in sorted(_FOLDER.iterdir())}
        return {
            **files,
            "/ui": files["/ui/index.html"],
            "/ui/state": {"GET": self._state},
            "/ui/timeline": {"GET": self._timeline},
        }

    async def _state(self, exchange: Exchange) -> None:
        """The cluster and this router's traffic now."""
        recent, frontend, cluster = self._recent, self._frontend, self._cluster
        targets = recent.targets
        now = ClusterNow(
            version=__version__,
            model=frontend.model.name,
            chat=frontend.model.template is not None,
            policy=self._policy,
            time_s=time.time(),
            kvstore_connected=cluster.connected,
            index_blocks=len(cluster.index),
            workers=[self._worker(*each) for each in frontend.placer.workers()],
            flows=[FlowNow(*pair, size) for pair, size in recent.flows.items()],
            requests=Requests(
                running=len(recent.running),
                waiting=sum(frontend.door.waiting().values()),
                prompt_tokens=recent.prompt_tokens,
                output_tokens=recent.output_tokens,
            ),
            latency=recent.latency(),
            goodput=recent.goodput(),
            targets=(targets.ttft_s, targets.tpot_s),
            recent=[each.now() for each in islice(reversed(recent.ended), _SHOWN_REQUESTS)],
        )
        await exchange.respond(200, msgspec.json.encode(now), "application/json")

    def _worker(self, known: KnownWorker, view: WorkerView, usable: bool) -> WorkerNow:
        return WorkerNow(
            id=view.worker_id,
            incarnation=view.incarnation,
            role=view.role.value,
            address=view.address,
            usable=usable,
            draining=view.draining,
            avoided=view.worker_id in self._frontend.placer.suspects.avoided(),
            running=view.running,
            waiting=view.waiting,
            queued_tokens=view.queued_tokens,
            total_blocks=view.total_blocks,
            free_blocks=view.free_blocks,
            cached_blocks=view.cached_blocks,
            block_bytes=known.layout.block_bytes,
        )

    async def _timeline(self, exchange: Exchange) -> None:
        """What became of the query's request, by its `x-request-id`."""
        ids = parse_qs(exchange.query).get("id", [])
        if len(ids) != 1:
            raise InvalidRequest("id: give one request id in the query", field="id")
        found = self._recent.find(ids[0])
        if not found:
            raise NotFound("no such request among the last ones")
        choices = Choices([each.now() for each in found])
        await exchange.respond(200, msgspec.json.encode(choices), "application/json")


def _file(path: Path) -> Handler:
    content, kind = path.read_bytes(), f"{_TYPES[path.suffix]}; charset=utf-8"

    async def respond(exchange: Exchange) -> None:
        await exchange.respond(200, content, kind, _HEADERS)

    return respond
