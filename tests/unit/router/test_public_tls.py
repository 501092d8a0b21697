"""With a certificate, clients reach the router by TLS, and by nothing else."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import grpc
import httpx
import pytest

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from tests.certificates import Authority, shows
from tests.unit.router.fakes import FakeWorker, running_router
from tests.waiting import until


async def test_clients_reach_both_fronts_by_tls_and_only_by_tls(worker: FakeWorker, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate = authority.sign("first")
    trusted = ssl.create_default_context(cafile=str(authority.certificate))
    pair = {"tls_cert": str(certificate.certificate), "tls_key": str(certificate.key)}
    async with running_router(worker, **pair) as up:
        url = f"https://127.0.0.1:{up.router.http_port}"
        async with httpx.AsyncClient(verify=trusted) as client:
            ask = {"prompt": [5, 6, 7], "max_tokens": 4}
            answer = await client.post(f"{url}/v1/completions", json=ask)
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == 4
            async with client.stream("POST", f"{url}/v1/completions", json={**ask, "stream": True}) as stream:
                events = [line async for line in stream.aiter_lines() if line]
            assert events[-1] == "data: [DONE]"
            assert (await client.get(f"{up.own_url}/metrics")).status_code == 200
        async with httpx.AsyncClient() as unaware:
            with pytest.raises(httpx.TransportError):
                await unaware.get(f"{url}/v1/models")
            with pytest.raises(httpx.TransportError):
                await unaware.get(f"{up.base_url}/v1/models")
        credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        async with grpc.aio.secure_channel(up.grpc_address, credentials) as channel:
            models = await inference_pb2_grpc.InferenceStub(channel).ListModels(
                inference_pb2.ListModelsRequest(), timeout=60
            )
            assert models.models[0].id == "baton-small"
        async with grpc.aio.insecure_channel(up.grpc_address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await inference_pb2_grpc.InferenceStub(channel).ListModels(
                    inference_pb2.ListModelsRequest(), timeout=60
                )
        certificate.replace(authority.sign("renewed"))
        await until(lambda: asyncio.to_thread(shows, trusted, up.router.http_port, "renewed"))
