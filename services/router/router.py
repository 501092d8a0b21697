"""The router process as one value: builds its parts, runs them, and stops them in order."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import aclosing, suppress

from baton.addresses import join
from baton.config import Settings
from baton.routing import Policy, Unplaceable, create_policy
from baton.rpc.server import Public, Server
from baton.rpc.v1 import inference_pb2_grpc, worker_pb2
from baton.security.access import Access
from baton.security.tls import PublicTls
from services.router.admission import Door
from services.router.app import App, OwnApp
from services.router.caller import Callers
from services.router.cluster import Cluster, router_id
from services.router.frontend import Frontend
from services.router.grpc_front import InferenceService
from services.router.http_server import HttpServer, listen
from services.router.lifecycle import ClusterChanges, Lifecycle
from services.router.metrics import Metrics
from services.router.model import ServedModel
from services.router.placement import Placer
from services.router.sessions import SessionPool
from services.router.timeline import Recent, Targets
from services.router.ui.page import Page

log = logging.getLogger(__name__)

_READINESS_CHECK_S = 1.0


class Router:
    """Everything between the clients' sockets and the workers' sessions. `run` serves until `stop` is set."""

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        """
        Raises:
            UnsupportedModel: the model cannot be read.
            BadSetting: the files of API keys or of the certificate cannot be used.
        """
        self._settings = settings.router
        self._observability = settings.observability
        self.model = ServedModel.load(settings.model, settings.router.tool_call_parser)
        self.metrics = Metrics(self.model.name, self.model.limits.max_model_len)
        self._cluster = cluster
        self._changes = ClusterChanges()
        self.sessions = SessionPool(router_id(), self.on_load, self._changes.notify)
        policy: Policy = create_policy(self._settings.policy, random.Random())
        self.metrics.prefills_beside.set(policy.prefills_beside)
        self._placer = Placer(policy, cluster, self.sessions)
        self._access = Access(self._settings.api_keys)
        self._tls = PublicTls.from_settings(self._settings)
        self._door = Door(self._settings, self._access, self._placer, self.metrics)
        self.recent = Recent(Targets(self._settings.slo_ttft_s, self._settings.slo_tpot_s))
        lifecycle = Lifecycle(
            self._placer,
            self.sessions,
            self._changes,
            self.model.tokenizer,
            self.metrics,
            self.recent,
            policy=self._settings.policy,
            max_placements=self._settings.max_placements,
        )
        self.frontend = Frontend(
            model=self.model,
            placer=self._placer,
            lifecycle=lifecycle,
            door=self._door,
            callers=Callers(self._settings.trust_tenant_header, self._settings.request_timeout_s),
            metrics=self.metrics,
            tenant_isolation=self._settings.tenant_isolation,
        )
        self.metrics.show_queues(self._door.waiting)
        self.metrics.workers_backed_off.set_function(lambda: len(self._placer.suspects.avoided()))
        self.http_port = 0
        self.grpc_port = 0
        self.metrics_port = 0

    def on_workers(self) -> None:
        """The registry's workers changed: hold sessions with them."""
        self.sessions.sync(worker.view for worker in self._cluster.workers.values())
        self._changes.notify()
        self._door.advance()

    def on_load(self, worker_id: str, load: worker_pb2.WorkerLoad) -> None:
        self._placer.on_load(worker_id, load)
        self._door.advance()

    def on_gone(self, worker_id: str) -> None:
        self._placer.forget(worker_id)
        self.recent.forget(worker_id)

    async def run(self, stop: asyncio.Event, listening: asyncio.Event) -> None:
        """Serve until `stop` is set, then let running requests finish for a bounded time.

        Sets `listening`, after which `http_port`, `grpc_port` and `metrics_port` are the real ones. The
        last one is never shared, so that each of several routers can be asked, and never encrypted.

        Raises:
            BadSetting: a port is taken.
        """
        grace_s, host, share = self._settings.stop_grace_s, self._settings.host, self._settings.share_ports
        max_bytes, head_s = self._settings.max_body_bytes, self._settings.head_timeout_s
        app = App(self.frontend, self._access, max_body_bytes=max_bytes)
        page = Page(self.frontend, self.recent, self._cluster, self._settings.policy)
        own_app = OwnApp(
            self.frontend, self._access, page, policy=self._settings.policy, max_body_bytes=max_bytes
        )
        tls = self._tls.http_context() if self._tls is not None else None
        http = HttpServer(app, grace_s=grace_s, head_timeout_s=head_s, tls=tls)
        own_http = HttpServer(own_app, grace_s=grace_s, head_timeout_s=head_s)
        own_host = self._observability.metrics_host or host
        public = Public(self._tls.grpc_credentials() if self._tls is not None else None, max_bytes)
        with (
            listen(host, self._settings.port, flag="--port", share=share) as listener,
            listen(own_host, self._observability.metrics_port, flag="--metrics-port") as own_listener,
        ):
            self.http_port = listener.getsockname()[1]
            self.metrics_port = own_listener.getsockname()[1]
            async with aclosing(self.model.grammars), Server(public, share_ports=share) as server:
                server.add(
                    inference_pb2_grpc.add_InferenceServicer_to_server,
                    InferenceService(self.frontend, self._access),
                    "baton.v1.Inference",
                )
                async with asyncio.TaskGroup() as tasks:
                    followers = [
                        tasks.create_task(self._cluster.run()),
                        tasks.create_task(self.sessions.run()),
                    ]
                    serving = [tasks.create_task(own_http.serve(sockets=[own_listener]))]
                    if share:  # else it would take connections from routers that know the workers already
                        await self._until_ready(stop)
                    self.grpc_port = server.bind(host, self._settings.grpc_port, flag="--grpc-port")
                    await server.start()
                    serving.append(tasks.create_task(http.serve(sockets=[listener])))
                    followers.append(tasks.create_task(self._follow_readiness(server)))
                    log.info(
                        "serving %s: %s on %s, gRPC on port %d, metrics on %s",
                        *(self.model.name, "HTTP" if tls is None else "HTTPS", join(host, self.http_port)),
                        *(self.grpc_port, join(own_host, self.metrics_port)),
                    )
                    listening.set()
                    await stop.wait()
                    log.info("stopping: running requests have %.0f s", grace_s)
                    self._door.close()
                    http.stop()
                    own_http.stop()
                    followers.pop().cancel()  # health says NOT_SERVING from here on
                    await server.stop(grace_s)
                    await asyncio.gather(*serving)
                    for follower in followers:
                        follower.cancel()

    async def _until_ready(self, stop: asyncio.Event) -> None:
        """Wait until a request could be placed, or the router is to stop."""
        while self._unready() and not stop.is_set():
            await self._readiness_may_change()

    async def _follow_readiness(self, server: Server) -> None:
        """Keep gRPC health in step with whether a request could be placed."""
        was_ready: bool | None = None
        while True:
            reason = self._unready()
            ready = not reason
            if ready != was_ready:
                log.info("ready" if ready else f"not ready: {reason}")
                await server.set_serving(ready)
                was_ready = ready
            await self._readiness_may_change()

    async def _readiness_may_change(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_READINESS_CHECK_S):
                await self._changes.wait()

    def _unready(self) -> str:
        """Why no request could be placed now; empty when one could."""
        try:
            self._placer.check_ready()
        except Unplaceable as error:
            return error.message
        return ""
