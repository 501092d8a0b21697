"""Does a server say when it serves, and fail clearly when it cannot listen?"""

import asyncio
import socket

import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry, Counter, start_http_server

from baton.config import BadSetting
from baton.rpc.channels import open_channel
from baton.rpc.probes import answer_probes
from baton.rpc.server import Server
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Admin(worker_pb2_grpc.WorkerAdminServicer):
    async def Status(self, request: object, context: object) -> worker_pb2.StatusResponse:
        return worker_pb2.StatusResponse(worker_id="decode-0")


async def test_health_and_reflection_describe_what_is_served() -> None:
    async with Server() as server:
        server.add(worker_pb2_grpc.add_WorkerAdminServicer_to_server, Admin(), "baton.v1.WorkerAdmin")
        port = server.bind("127.0.0.1", 0, flag="--worker-port")
        assert port > 0
        await server.start()
        async with open_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            everything = health_pb2.HealthCheckRequest()
            admin = health_pb2.HealthCheckRequest(service="baton.v1.WorkerAdmin")
            assert (await health.Check(everything)).status == NOT_SERVING
            await server.set_serving(True)
            assert (await health.Check(everything)).status == SERVING
            assert (await health.Check(admin)).status == SERVING
            await server.set_serving(False, "baton.v1.WorkerAdmin")
            assert (await health.Check(everything)).status == SERVING
            assert (await health.Check(admin)).status == NOT_SERVING

            status = await worker_pb2_grpc.WorkerAdminStub(channel).Status(worker_pb2.StatusRequest())
            assert status.worker_id == "decode-0"

            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            async for answer in reflection.ServerReflectionInfo(iter([question])):
                names = {service.name for service in answer.list_services_response.service}
                assert {"baton.v1.WorkerAdmin", "grpc.health.v1.Health"} <= names


async def test_a_server_that_does_not_stop_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("baton.rpc.server._STOP_S", 0.1)
    monkeypatch.setattr("grpc.aio._server.Server.stop", lambda server, grace: asyncio.Event().wait())
    async with asyncio.timeout(60), Server() as server:
        await server.stop(0)
    assert "gRPC has not stopped" in caplog.text


async def test_a_taken_port_is_refused_naming_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with Server() as server:
            with pytest.raises(BadSetting, match="--grpc-port") as caught:
                server.bind("127.0.0.1", taken.getsockname()[1], flag="--grpc-port")
    assert caught.value.field == "grpc_port"


async def test_two_servers_never_share_a_port() -> None:
    async with Server() as first, Server() as second:
        port = first.bind("127.0.0.1", 0, flag="--worker-port")
        with pytest.raises(BadSetting, match=str(port)):
            second.bind("127.0.0.1", port, flag="--worker-port")


async def test_probes_are_answered_over_http_beside_the_metrics() -> None:
    registry = CollectorRegistry()
    Counter("seen", "Something counted.", registry=registry)
    async with Server() as server:
        metrics, thread = start_http_server(0, "127.0.0.1", registry)
        try:
            answer_probes(metrics, lambda: server.serving)

            def ask(path: str) -> int:
                return httpx.get(f"http://127.0.0.1:{metrics.server_port}{path}", timeout=60).status_code

            async def asked() -> list[int]:
                return [await asyncio.to_thread(ask, path) for path in ("/live", "/ready", "/metrics")]

            assert await asked() == [200, 503, 200]
            await server.set_serving(True)
            assert await asked() == [200, 200, 200]
            await server.stop(0)
            assert await asked() == [200, 503, 200]
        finally:
            await asyncio.to_thread(metrics.shutdown)
            thread.join()
