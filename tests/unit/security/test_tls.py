"""TLS: what clients see, and how processes know each other."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.config import BadSetting, InternalTlsSettings, RouterSettings
from baton.rpc import channels
from baton.rpc.channels import open_channel, use_internal_tls
from baton.rpc.server import Server
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.security.tls import PublicTls
from tests.certificates import Authority, Certificate, shows
from tests.waiting import until


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def certificate(authority: Authority) -> Certificate:
    return authority.sign("first")


def internal(authority: Authority, certificate: Certificate, name: str = "baton") -> InternalTlsSettings:
    return InternalTlsSettings(
        internal_tls_cert=str(certificate.certificate),
        internal_tls_key=str(certificate.key),
        internal_tls_ca=str(authority.certificate),
        internal_tls_name=name,
    )


@pytest.fixture
def identity(authority: Authority, certificate: Certificate) -> Iterator[Certificate]:
    """This process has a certificate, for its servers and its channels."""
    use_internal_tls(internal(authority, certificate))
    yield certificate
    use_internal_tls(InternalTlsSettings())


class Admin(worker_pb2_grpc.WorkerAdminServicer):
    """Says whose certificate called; `Drain` takes a second, while others go on."""

    async def Status(self, request: object, context: grpc.aio.ServicerContext) -> worker_pb2.StatusResponse:
        (name,) = context.auth_context()["x509_common_name"]
        return worker_pb2.StatusResponse(worker_id=name.decode())

    async def Drain(self, request: object, context: grpc.aio.ServicerContext) -> worker_pb2.DrainResponse:
        await asyncio.sleep(1.0)
        return worker_pb2.DrainResponse(unfinished=7)


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    async with Server() as server:
        server.add(worker_pb2_grpc.add_WorkerAdminServicer_to_server, Admin(), "baton.v1.WorkerAdmin")
        port = server.bind("127.0.0.1", 0, flag="--worker-port")
        await server.start()
        yield f"127.0.0.1:{port}"


async def status_of(channel: grpc.aio.Channel) -> str:
    stub = worker_pb2_grpc.WorkerAdminStub(channel)
    answer: worker_pb2.StatusResponse = await stub.Status(worker_pb2.StatusRequest(), timeout=60)
    return answer.worker_id


async def refused(channel: grpc.aio.Channel) -> bool:
    async with channel:
        try:
            await status_of(channel)
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            return True
    return False


async def test_processes_with_certificates_of_one_authority_talk(identity: Certificate) -> None:
    async with serving() as address, open_channel(address) as channel:
        assert await status_of(channel) == "first"
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_whoever_has_none_or_anothers_is_refused(
    identity: Certificate, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    theirs = stranger.sign("theirs")
    ours = authority.certificate.read_bytes()
    name = (("grpc.ssl_target_name_override", "baton"),)

    def with_pair(pair: Certificate | None) -> grpc.ChannelCredentials:
        if pair is None:
            return grpc.ssl_channel_credentials(ours)
        return grpc.ssl_channel_credentials(ours, pair.key.read_bytes(), pair.certificate.read_bytes())

    async with serving() as address:
        assert await refused(grpc.aio.insecure_channel(address))
        assert await refused(grpc.aio.secure_channel(address, with_pair(None), options=name))
        assert await refused(grpc.aio.secure_channel(address, with_pair(theirs), options=name))
        assert not await refused(
            grpc.aio.secure_channel(address, with_pair(authority.sign("member")), options=name)
        )


async def test_a_server_of_another_authority_or_name_gets_no_calls(
    authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    impostors = (
        internal(stranger, stranger.sign("impostor")),
        internal(authority, authority.sign("elsewhere", "DNS:elsewhere"), "elsewhere"),
    )
    for impostor in impostors:
        use_internal_tls(impostor)
        async with serving() as address:
            use_internal_tls(internal(authority, certificate))
            assert await refused(open_channel(address))
    use_internal_tls(InternalTlsSettings())
    async with serving() as address:
        use_internal_tls(internal(authority, certificate))
        assert await refused(open_channel(address)), "nothing falls back to plain text"
        use_internal_tls(InternalTlsSettings())


async def test_renewed_certificates_are_used_by_both_ends_without_a_restart(
    identity: Certificate, authority: Authority
) -> None:
    async with serving() as address, open_channel(address) as channel:
        assert await status_of(channel) == "first"
        stub = worker_pb2_grpc.WorkerAdminStub(channel)
        running = stub.Drain(worker_pb2.DrainRequest(), timeout=60)
        await running.wait_for_connection()
        identity.replace(authority.sign("second"))

        async def renewed() -> bool:
            return await status_of(channel) == "second"

        await until(renewed)
        assert (await running).unfinished == 7, "a call that ran went on"
        member = ssl.create_default_context(cafile=str(authority.certificate))
        member.load_cert_chain(identity.certificate, identity.key)
        member.set_alpn_protocols(["h2"])
        port = int(address.rpartition(":")[2])
        await until(lambda: asyncio.to_thread(shows, member, port, "second"))


async def test_a_renewal_half_done_or_wrong_changes_nothing(
    identity: Certificate, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    other = authority.sign("other")
    async with serving() as address, open_channel(address) as channel:
        identity.key.write_bytes(other.key.read_bytes())  # the certificate is not there yet

        async def noticed() -> bool:
            assert await status_of(channel) == "first"
            return "still counts" in caplog.text

        await until(noticed)
        async with open_channel(address) as another:
            assert await status_of(another) == "first"


def test_internal_tls_is_all_or_nothing(
    authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    whole = internal(authority, certificate)
    for settings in (
        InternalTlsSettings(require_internal_tls=True),
        InternalTlsSettings(internal_tls_cert=whole.internal_tls_cert),
        InternalTlsSettings(whole.internal_tls_cert, whole.internal_tls_key),
        InternalTlsSettings(whole.internal_tls_cert, whole.internal_tls_key, str(tmp_path / "nothing")),
        InternalTlsSettings(whole.internal_tls_cert, str(authority.sign("other").key), whole.internal_tls_ca),
    ):
        with pytest.raises(BadSetting, match="--internal-tls"):
            use_internal_tls(settings)
        assert channels.internal_credentials() is None
    use_internal_tls(InternalTlsSettings())


def test_a_public_certificate_needs_its_key(certificate: Certificate, authority: Authority) -> None:
    assert PublicTls.from_settings(RouterSettings()) is None
    for cert, key in (
        (certificate.certificate, ""),
        ("", certificate.key),
        (certificate.certificate, authority.sign("other").key),
        (certificate.key, certificate.certificate),
        ("/nowhere", "/nowhere"),
    ):
        with pytest.raises(BadSetting, match="--tls-cert"):
            PublicTls.from_settings(RouterSettings(tls_cert=str(cert), tls_key=str(key)))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
async def test_old_versions_of_tls_are_refused(certificate: Certificate, version: ssl.TLSVersion) -> None:
    pair = RouterSettings(tls_cert=str(certificate.certificate), tls_key=str(certificate.key))
    tls = PublicTls.from_settings(pair)
    assert tls is not None
    assert tls.http_context().minimum_version > version
