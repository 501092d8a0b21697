"""As much of the Kubernetes API as the planner uses, over HTTP, for the official client to talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from kubernetes.aio.client import ApiClient, Configuration

SPACE = "space"


class ApiServer:
    """Deployments by name with their replicas, Leases, and the Events that were written.

    `log` has every request as (method, path). With `refuse` set to a status, everything is answered so.
    """

    def __init__(self, **replicas: int) -> None:
        self.replicas = {name.replace("_", "-"): count for name, count in replicas.items()}
        self.leases: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.log: list[tuple[str, str]] = []
        self.refuse = 0

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ApiClient]:
        """The official client, pointed here."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            async with ApiClient(Configuration(host=f"http://{host}:{port}")) as client:
                yield client
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.log.append((request.method, request.path))
        body = await request.json() if request.can_read_body else None
        match request.method, request.path.strip("/").split("/"):
            case _ if self.refuse:
                return _status(self.refuse)
            case "GET", [_, "apps", "v1", "namespaces", "space", "deployments", name, "scale"]:
                return self._scale(name)
            case "PATCH", [_, "apps", "v1", "namespaces", "space", "deployments", name, "scale"]:
                if request.content_type != "application/merge-patch+json":
                    return _status(415)
                if name in self.replicas:
                    self.replicas[name] = body["spec"]["replicas"]
                return self._scale(name)
            case "POST", ["api", "v1", "namespaces", "space", "events"]:
                self.events.append(body)
                return web.json_response(body, status=201)
            case method, [_, "coordination.k8s.io", "v1", "namespaces", "space", "leases", *names]:
                return self._lease(method, names, body)
        return _status(404)

    def _scale(self, name: str) -> web.Response:
        if name not in self.replicas:
            return _status(404)
        count = self.replicas[name]
        return web.json_response(
            {
                "kind": "Scale",
                "apiVersion": "autoscaling/v1",
                "metadata": {"name": name, "namespace": SPACE},
                "spec": {"replicas": count} if count else {},
                "status": {"replicas": count},
            }
        )

    def _lease(self, method: str, names: list[str], body: dict[str, Any] | None) -> web.Response:
        if method == "POST" and body is not None:
            names = [body["metadata"]["name"]]
            if names[0] in self.leases:
                return _status(409)
        known = self.leases.get(names[0])
        if method == "GET":
            return _status(404) if known is None else web.json_response(known)
        assert body is not None
        if known is not None and body["metadata"]["resourceVersion"] != known["metadata"]["resourceVersion"]:
            return _status(409)
        version = 1 if known is None else int(known["metadata"]["resourceVersion"]) + 1
        body["metadata"]["resourceVersion"] = str(version)
        self.leases[names[0]] = body
        return web.json_response(body)


def _status(code: int) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": "Scripted"}
    return web.json_response(body, status=code)
