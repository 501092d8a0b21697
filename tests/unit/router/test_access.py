"""Keys at the router's two fronts: who comes in, what they are told, what is not there at all."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openai import AsyncOpenAI, AuthenticationError, PermissionDeniedError, RateLimitError

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from baton.security.keys import ApiKey, new_key, write_keys
from tests.unit.router.fakes import FakeWorker, RunningRouter, running_router

C = "/v1/completions"
ASK = {"prompt": [5, 6, 7], "max_tokens": 4}
KEYED = (
    ("POST", C),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/baton-small"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/no/such/path"),
)


class Keyed:
    """A router with keys: of tenants a and b, without a tenant, limited, and revoked."""

    def __init__(self, file: Path) -> None:
        self.secrets: dict[str, str] = {}
        self._keys: list[ApiKey] = []
        for name, options in {
            "a": {"tenant": "a"},
            "b": {"tenant": "b"},
            "none": {},
            "two": {"requests_per_minute": 2},
            "few": {"tokens_per_minute": 6},
            "revoked": {},
        }.items():
            self.secrets[name], key = new_key(**options)
            self._keys.append(key)
        self._keys[-1] = ApiKey(id="gone", sha256=self._keys[-1].sha256, revoked=True)
        write_keys(file, self._keys)

    def headers(self, name: str, **more: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets[name]}", **more}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def keyed(file: Path) -> Keyed:
    return Keyed(file)


@pytest.fixture
async def router(worker: FakeWorker, keyed: Keyed, file: Path) -> AsyncIterator[RunningRouter]:
    async with running_router(worker, api_keys=str(file), tenant_isolation=True) as up:
        yield up


@pytest.mark.parametrize(("method", "path"), KEYED)
@pytest.mark.parametrize("own", [False, True], ids=["public", "own"])
async def test_nothing_that_clients_use_is_served_without_a_key(
    router: RunningRouter, worker: FakeWorker, method: str, path: str, own: bool
) -> None:
    async with httpx.AsyncClient(base_url=router.own_url if own else router.base_url) as client:
        for headers in ({}, {"authorization": "Bearer sk-baton-no"}, {"authorization": "Basic eA=="}):
            refused = await client.request(method, path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert worker.starts == []


async def test_probes_need_no_key(http: httpx.AsyncClient) -> None:
    for path in ("/health", "/live", "/ready"):
        assert (await http.get(path)).status_code == 200


async def test_openais_client_gets_openais_errors(router: RunningRouter, keyed: Keyed) -> None:
    def client(key: str) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{router.base_url}/v1", api_key=key, max_retries=0)

    async with client(keyed.secrets["a"]) as good:
        answer = await good.completions.create(model="baton-small", prompt="Hi", max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2
    async with client("sk-baton-wrong") as wrong:
        with pytest.raises(AuthenticationError):
            await wrong.models.list()
    async with client(keyed.secrets["revoked"]) as revoked:
        with pytest.raises(PermissionDeniedError, match="gone was revoked"):
            await revoked.models.list()
    async with client(keyed.secrets["two"]) as limited:
        await limited.models.list()
        await limited.models.list()
        with pytest.raises(RateLimitError) as refused:
            await limited.models.list()
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30


async def test_tokens_of_prompt_and_answer_count(http: httpx.AsyncClient, keyed: Keyed) -> None:
    assert (await http.post(C, json=ASK, headers=keyed.headers("few"))).status_code == 200
    refused = await http.post(C, json=ASK, headers=keyed.headers("few"))
    assert refused.status_code == 429
    # 7 of 6 tokens are used: two more make one, at 6 per minute.
    assert 10 <= int(refused.headers["retry-after"]) <= 20
    assert "6 tokens per minute" in refused.json()["error"]["message"]


async def test_the_tenant_is_the_keys_and_not_the_headers(
    http: httpx.AsyncClient, worker: FakeWorker, keyed: Keyed
) -> None:
    for name in ("a", "b", "none"):
        headers = keyed.headers(name, **{"x-tenant-id": "a"})
        assert (await http.post(C, json=ASK, headers=headers)).status_code == 200
    assert [start.cache_salt for start in worker.starts] == ["1:a", "1:b", "0:"]


async def test_a_trusted_proxy_names_tenants_with_a_key_of_no_tenant(
    worker: FakeWorker, keyed: Keyed, file: Path
) -> None:
    async with (
        running_router(worker, api_keys=str(file), tenant_isolation=True, trust_tenant_header=True) as up,
        httpx.AsyncClient(base_url=up.base_url) as client,
    ):
        for name, tenant, status in (("none", "c", 200), ("a", "a", 200), ("a", "b", 403)):
            headers = keyed.headers(name, **{"x-tenant-id": tenant})
            answer = await client.post(C, json=ASK, headers=headers)
            assert answer.status_code == status, answer.text
    assert [start.cache_salt for start in worker.starts] == ["1:c", "1:a"]
    assert answer.json()["error"]["code"] == "permission_denied"


async def test_without_trust_the_tenant_header_means_nothing(worker: FakeWorker) -> None:
    async with (
        running_router(worker, tenant_isolation=True) as up,
        httpx.AsyncClient(base_url=up.base_url) as client,
    ):
        assert (await client.post(C, json=ASK, headers={"x-tenant-id": "a"})).status_code == 200
    assert worker.starts[0].cache_salt == "0:"


async def test_a_new_key_works_and_an_old_one_does_not_within_seconds(
    http: httpx.AsyncClient, keyed: Keyed, file: Path
) -> None:
    secret, key = new_key()
    write_keys(file, [key])
    deadline = time.monotonic() + 10
    headers = {"authorization": f"Bearer {secret}"}
    while (await http.get("/v1/models", headers=headers)).status_code != 200:
        assert time.monotonic() < deadline
    assert (await http.get("/v1/models", headers=keyed.headers("a"))).status_code == 401


async def test_grpc_asks_for_the_same_keys(router: RunningRouter, keyed: Keyed, worker: FakeWorker) -> None:
    request = inference_pb2.GenerateRequest()
    request.token_ids.ids.extend([5, 6, 7])
    request.sampling.max_tokens = 2

    async with grpc.aio.insecure_channel(router.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def code(call: str, name: str | None) -> grpc.StatusCode:
            headers = keyed.headers(name) if name in keyed.secrets else {}
            if name == "wrong":
                headers = {"authorization": "Bearer sk-baton-wrong"}
            metadata = tuple(headers.items())
            if call == "Generate":
                answer = stub.Generate(request, metadata=metadata)
                try:
                    async for _ in answer:
                        pass
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return grpc.StatusCode.OK
            asked = inference_pb2.TokenizeRequest(text="a") if call == "Tokenize" else None
            try:
                await getattr(stub, call)(asked or inference_pb2.ListModelsRequest(), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        for call in ("Generate", "ListModels", "Tokenize"):
            assert await code(call, None) == grpc.StatusCode.UNAUTHENTICATED
            assert await code(call, "wrong") == grpc.StatusCode.UNAUTHENTICATED
            assert await code(call, "revoked") == grpc.StatusCode.PERMISSION_DENIED
        assert worker.starts == []
        for call in ("Generate", "ListModels", "Tokenize"):
            assert await code(call, "a") == grpc.StatusCode.OK
        assert await code("ListModels", "two") == grpc.StatusCode.OK
        assert await code("ListModels", "two") == grpc.StatusCode.OK
        assert await code("ListModels", "two") == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_public_ports_have_no_metrics_no_debugging_and_no_administration(
    worker: FakeWorker,
) -> None:
    async with (
        running_router(worker) as up,
        httpx.AsyncClient(base_url=up.base_url) as public,
        httpx.AsyncClient(base_url=up.own_url) as own,
    ):
        for path in ("/metrics", "/debug/route?prompt=Hi"):
            assert (await public.get(path)).status_code == 404
            assert (await own.get(path)).status_code == 200
        async with grpc.aio.insecure_channel(up.grpc_address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            async for answer in stub.ServerReflectionInfo(iter([question])):
                names = {service.name for service in answer.list_services_response.service}
    assert names == {
        "baton.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
