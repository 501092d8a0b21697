"""Which certificates a process shows, as files that may be replaced while it runs."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from baton.config import BadSetting, InternalTlsSettings, RouterSettings
from baton.errors import BatonError
from baton.security.reload import Reloaded


@dataclass(frozen=True)
class Pem:
    """A certificate with its chain, its private key, and who must have signed the other side's."""

    certificate: bytes
    key: bytes
    authority: bytes | None


@dataclass(frozen=True)
class PemFiles:
    """Where they are; `authority` None: the other side need not show a certificate."""

    certificate: Path
    key: Path
    authority: Path | None = None

    def paths(self) -> list[Path]:
        return [path for path in (self.certificate, self.key, self.authority) if path is not None]

    def context(self) -> ssl.SSLContext:
        """A server's context of what the files hold.

        Raises:
            BatonError: a file cannot be used, or the key is not the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            # A key behind a password would make OpenSSL ask for it on the terminal.
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
            if self.authority is not None:
                context.load_verify_locations(self.authority)
        except (OSError, ValueError) as error:
            names = ", ".join(map(str, self.paths()))
            raise BatonError(f"{names}: no certificate with its key in PEM: {error}") from error
        return context

    def read(self) -> Pem:
        """
        Raises:
            BatonError: as `context`.
        """
        self.context()
        try:
            authority = self.authority.read_bytes() if self.authority is not None else None
            return Pem(self.certificate.read_bytes(), self.key.read_bytes(), authority)
        except OSError as error:
            raise BatonError(f"{error.filename}: cannot be read: {error.strerror}") from error


class PublicTls:
    """What a router shows its clients over HTTP and gRPC."""

    def __init__(self, files: PemFiles) -> None:
        """
        Raises:
            BatonError: the files cannot be used.
        """
        self._contexts = Reloaded(files.paths(), files.context)
        self._pem = Reloaded(files.paths(), files.read)

    @classmethod
    def from_settings(cls, settings: RouterSettings) -> PublicTls | None:
        """
        Raises:
            BadSetting: only one file is named, or they cannot be used.
        """
        if not settings.tls_cert and not settings.tls_key:
            return None
        if not settings.tls_cert or not settings.tls_key:
            raise BadSetting("--tls-cert and --tls-key go together", field="tls_cert")
        try:
            return cls(PemFiles(Path(settings.tls_cert), Path(settings.tls_key)))
        except BatonError as error:
            raise BadSetting(f"--tls-cert, --tls-key: {error.message}", field="tls_cert") from error

    def http_context(self) -> ssl.SSLContext:
        """A context whose handshakes use the files as they then are."""
        context = self._contexts.current()

        def renew(handshake: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            handshake.context = self._contexts.current()

        # Called in every handshake, whether or not the client names a server.
        context.sni_callback = renew
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        return server_credentials(self._pem.current)


def server_credentials(current: Callable[[], Pem]) -> grpc.ServerCredentials:
    """Credentials of a gRPC server whose handshakes use what `current` then answers."""
    used = current()

    def renew() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC in every handshake, on threads of its own; None: as before."""
        nonlocal used
        now = current()
        if now is used:
            return None
        used = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used),
        renew,  # type: ignore[arg-type]  # the stubs know of no None
        require_client_authentication=used.authority is not None,
    )


def internal_files(settings: InternalTlsSettings) -> PemFiles | None:
    """The files of a process's certificate among the others; None where they speak in the clear.

    Raises:
        BadSetting: some files are named and others are not, or none is and they are required.
    """
    named = (settings.internal_tls_cert, settings.internal_tls_key, settings.internal_tls_ca)
    if all(named):
        certificate, key, authority = map(Path, named)
        return PemFiles(certificate, key, authority)
    if any(named) or settings.require_internal_tls:
        raise BadSetting(
            "--internal-tls-cert, --internal-tls-key and --internal-tls-ca go together"
            + (", and --require-internal-tls asks for them" if settings.require_internal_tls else ""),
            field="internal_tls_cert",
        )
    return None


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.authority)


def _no_password() -> str:
    raise ValueError("the private key is encrypted; give one without a password")
