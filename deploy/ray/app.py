"""baton as a Ray Serve application: `serve run deploy.ray.app:app model=/models/llama prefill=2 decode=2`.

Serve places the processes, restarts them and scales them; what they say to each other goes over gRPC and
NIXL, as everywhere, and not through Ray. Clients use Serve's HTTP port.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import grpc
import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from baton.addresses import join, split
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from deploy.ray.process import Gone, Process, free_port, serving

_STATUS_TIMEOUT_S = 5.0
_HEALTH = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0}
_HOP_BY_HOP = frozenset({"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})


class Arguments(BaseModel):
    """What `serve run` takes as NAME=VALUE, or a RayService as `args`.

    `model` is a folder that every node has, or a Hugging Face id; empty is the bundled one. `prefill` and
    `decode` are workers, `max_prefill` and `max_decode`, if larger, what each may grow to. `gpus` and `cpus`
    are of one worker, which Ray reserves together. `worker` are more settings of the workers, by name.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    prefill: int = 1
    decode: int = 1
    max_prefill: int = 0
    max_decode: int = 0
    routers: int = 1
    gpus: float = 0
    cpus: float = 1
    drain_timeout_s: float = 30.0
    worker: dict[str, Any] = {}


@serve.deployment(name="kvstore", num_replicas=1, ray_actor_options={"num_cpus": 0.1}, **_HEALTH)
class Kvstore:
    """The registry of workers and the prefix index."""

    def __init__(self) -> None:
        host = ray.util.get_node_ip_address()
        self._address = join(host, free_port(host))
        flags = {"kvstore_host": host, "kvstore_port": split(self._address)[1]}
        self._process = Process("kvstore", flags, lambda: serving(self._address), stop_s=5.0)
        self._process.wait_ready()

    def address(self) -> str:
        """Its host:port."""
        return self._address

    def check_health(self) -> None:
        self._process.check()

    def __del__(self) -> None:
        self._process.stop()


class _Follower:
    """Whatever is told where the kvstore is when it starts, and starts anew when that has moved."""

    async def _find(self, kvstore: DeploymentHandle) -> str:
        self._handle = kvstore
        self._kvstore: str = await kvstore.address.remote()
        return self._kvstore

    async def _check_kvstore(self) -> None:
        moved = await self._handle.address.remote()
        if moved != self._kvstore:
            raise Gone(f"the kvstore has moved from {self._kvstore} to {moved}")


class _Worker(_Follower):
    """A prefill or decode worker."""

    async def __init__(self, role: str, arguments: Arguments, kvstore: DeploymentHandle) -> None:
        host = ray.util.get_node_ip_address()
        self._address = join(host, free_port(host))
        flags: dict[str, object] = {
            "kvstore": await self._find(kvstore),
            "role": role,
            "worker_id": serve.get_replica_context().replica_id.unique_id,
            "worker_host": host,
            "worker_port": split(self._address)[1],
            "drain_timeout_s": arguments.drain_timeout_s,
            **_model(arguments),
            **({"device": "cuda"} if arguments.gpus else {}),
            **arguments.worker,
        }
        stop_s = arguments.drain_timeout_s + 5.0
        self._process = Process("decode", flags, lambda: serving(self._address), stop_s)
        self._process.wait_ready()

    async def check_health(self) -> None:
        self._process.check()
        await self._check_kvstore()

    def address(self) -> str:
        """Its host:port."""
        return self._address

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler reads: the worker's queue, as it reports it to routers."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            status = await worker_pb2_grpc.WorkerAdminStub(channel).Status(
                worker_pb2.StatusRequest(), timeout=_STATUS_TIMEOUT_S
            )
        load = status.load
        return {
            "queued_tokens": load.queued_tokens,
            "requests": load.running + load.waiting,
            "kv_usage": 1 - load.free_blocks / max(1, load.total_blocks),
        }

    def __del__(self) -> None:
        self._process.stop()


@serve.deployment(name="prefill", max_ongoing_requests=100, **_HEALTH)
class Prefill(_Worker):
    """A worker that computes prompts for others."""

    async def __init__(self, arguments: Arguments, kvstore: DeploymentHandle) -> None:
        await super().__init__("prefill", arguments, kvstore)


@serve.deployment(name="decode", max_ongoing_requests=100, **_HEALTH)
class Decode(_Worker):
    """A worker that generates tokens."""

    async def __init__(self, arguments: Arguments, kvstore: DeploymentHandle) -> None:
        await super().__init__("decode", arguments, kvstore)


@serve.deployment(name="router", max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0.5}, **_HEALTH)
class Router(_Follower):
    """A router, and the way to it from Serve's HTTP port.

    It is given the workers' handles only so that Serve starts them as parts of the application.
    """

    async def __init__(
        self, arguments: Arguments, kvstore: DeploymentHandle, *workers: DeploymentHandle
    ) -> None:
        self._workers = workers
        host = "127.0.0.1"
        flags = {
            "kvstore": await self._find(kvstore),
            "host": host,
            "port": (port := free_port(host)),
            "grpc_port": (grpc_port := free_port(host)),
            **_model(arguments),
        }
        self._url = f"http://{host}:{port}"
        self._process = Process("router", flags, lambda: serving(f"{host}:{grpc_port}"), stop_s=10.0)
        self._process.wait_ready()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, connect=10)
        )

    async def check_health(self) -> None:
        self._process.check()
        await self._check_kvstore()

    async def __call__(self, request: Request) -> Response:
        """Pass a request on to the router and its answer back, piece by piece."""
        headers = {key: value for key, value in request.headers.items() if key not in _HOP_BY_HOP}
        answer = await self._session.request(
            request.method,
            f"{self._url}{request.url.path}",
            params=request.query_params,
            headers=headers,
            data=await request.body(),
            allow_redirects=False,
        )

        async def pieces() -> Any:
            # Closed on the way out, also when the client has left: the router then cancels the request.
            async with answer:
                async for piece in answer.content.iter_any():
                    yield piece

        passed = {key: value for key, value in answer.headers.items() if key.lower() not in _HOP_BY_HOP}
        return StreamingResponse(pieces(), answer.status, passed)

    async def __del__(self) -> None:
        self._process.stop()
        await self._session.close()


def _model(arguments: Arguments) -> dict[str, object]:
    return {"model": arguments.model} if arguments.model else {}


def _placed(deployment: Any, arguments: Arguments, count: int, most: int) -> Any:
    """`deployment` with its replicas and what each reserves; a worker's GPUs are of one node."""
    bundle = {"CPU": arguments.cpus, **({"GPU": arguments.gpus} if arguments.gpus else {})}
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        "placement_group_bundles": [bundle],
        "placement_group_strategy": "STRICT_PACK",
        "graceful_shutdown_timeout_s": arguments.drain_timeout_s + 10,
    }
    if most <= count:
        return deployment.options(num_replicas=count, **options)
    policy = AutoscalingPolicy(policy_function="deploy.ray.scaling:by_queue")
    scaling = AutoscalingConfig(min_replicas=count, max_replicas=most, policy=policy)
    return deployment.options(autoscaling_config=scaling, **options)


def app(given: dict[str, Any]) -> Application:
    """The application that `serve run` builds of its NAME=VALUE arguments, see `Arguments`."""
    arguments = Arguments.model_validate(given)
    kvstore = Kvstore.bind()
    prefill = _placed(Prefill, arguments, arguments.prefill, arguments.max_prefill)
    decode = _placed(Decode, arguments, arguments.decode, arguments.max_decode)
    workers = (prefill.bind(arguments, kvstore), decode.bind(arguments, kvstore))
    return Router.options(num_replicas=arguments.routers).bind(arguments, kvstore, *workers)  # type: ignore[no-any-return]
