"""A whole cluster with everything locked: TLS outside, certificates between processes, keys for clients."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest

from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.security.keys import new_key, write_keys
from tests.certificates import Authority
from tests.cluster import Cluster
from tests.conftest import StartCluster

TIMEOUT_S = 10.0
OURS = (("grpc.ssl_target_name_override", "baton"),)
C = "/v1/completions"


@contextmanager
def refused() -> Iterator[None]:
    """What is inside gets no answer."""
    with pytest.raises(grpc.RpcError) as refusal:
        yield
    assert refusal.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Locked:
    """The cluster, and what opens it."""

    def __init__(self, cluster: Cluster, authority: Authority, secret: str) -> None:
        self.cluster = cluster
        self.authority = authority
        self.secret = secret
        self._member = authority.sign("operator")

    def client(self) -> httpx.Client:
        trusted = ssl.create_default_context(cafile=str(self.authority.certificate))
        headers = {"authorization": f"Bearer {self.secret}"}
        return httpx.Client(base_url=self.cluster.base_url, verify=trusted, headers=headers, timeout=60)

    def member(self, address: str) -> grpc.Channel:
        """A channel with a certificate of the cluster's authority."""
        pair = (self._member.key.read_bytes(), self._member.certificate.read_bytes())
        credentials = grpc.ssl_channel_credentials(self.authority.certificate.read_bytes(), *pair)
        return grpc.secure_channel(address, credentials, options=OURS)

    def strangers(self, address: str) -> list[grpc.Channel]:
        """Channels of whoever can reach the port but has no such certificate."""
        credentials = grpc.ssl_channel_credentials(self.authority.certificate.read_bytes())
        return [grpc.insecure_channel(address), grpc.secure_channel(address, credentials, options=OURS)]

    def workers(self) -> dict[str, str]:
        with self.member(self.cluster.kvstore_address) as channel:
            registry = kvstore_pb2_grpc.RegistryStub(channel)
            snapshot = next(iter(registry.Watch(kvstore_pb2.WatchRequest(), timeout=TIMEOUT_S)))
        return {change.worker.worker_id: change.worker.address for change in snapshot.changes}


@pytest.fixture(scope="module")
def locked(start_cluster: StartCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    folder: Path = tmp_path_factory.mktemp("locks")
    authority = Authority(folder)
    inside, outside = authority.sign("inside"), authority.sign("outside")
    secret, key = new_key(tenant="acme")
    keys = folder / "keys.json"
    write_keys(keys, [key])
    flags = (
        *("--internal-tls-cert", str(inside.certificate), "--internal-tls-key", str(inside.key)),
        *("--internal-tls-ca", str(authority.certificate), "--require-internal-tls"),
        *("--tls-cert", str(outside.certificate), "--tls-key", str(outside.key), "--api-keys", str(keys)),
        *("--policy", "round-robin"),  # which prefills remotely, whatever the curves predict
    )
    with start_cluster(*flags) as cluster:
        yield Locked(cluster, authority, secret)


def test_a_prompt_is_prefilled_on_one_worker_and_decoded_on_another(locked: Locked) -> None:
    assert locked.cluster.base_url.startswith("https://")
    with locked.client() as client:
        answer = client.post(C, json={"prompt": list(range(100, 900)), "max_tokens": 8, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8
        assert answer.headers["x-baton-prefill"] == "remote"
        assert httpx.get(f"{locked.cluster.own_url}/ready").status_code == 200
        del client.headers["authorization"]
        assert client.get("/v1/models").status_code == 401


def test_strangers_learn_nothing_from_any_process(locked: Locked) -> None:
    """Neither where KV lies in memory, nor who is there, nor may they add to it or order anybody about."""
    workers = locked.workers()
    assert len(workers) == 2
    for address in workers.values():
        for channel in locked.strangers(address):
            with channel:
                kv, admin = worker_pb2_grpc.KvStub(channel), worker_pb2_grpc.WorkerAdminStub(channel)
                with refused():
                    kv.Connect(worker_pb2.ConnectRequest(reader_id="x"), timeout=TIMEOUT_S)
                with refused():
                    admin.Drain(worker_pb2.DrainRequest(), timeout=TIMEOUT_S)
    for channel in locked.strangers(locked.cluster.kvstore_address):
        with channel, refused():
            registry = kvstore_pb2_grpc.RegistryStub(channel)
            next(iter(registry.Watch(kvstore_pb2.WatchRequest(), timeout=TIMEOUT_S)))


def test_members_may_ask(locked: Locked) -> None:
    for worker_id, address in locked.workers().items():
        with locked.member(address) as channel:
            status = worker_pb2_grpc.WorkerAdminStub(channel).Status(
                worker_pb2.StatusRequest(), timeout=TIMEOUT_S
            )
            assert status.worker_id == worker_id
