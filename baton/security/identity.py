"""Who this process is among the others: one certificate for all its gRPC servers and channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from baton.config import BadSetting, InternalTlsSettings
from baton.errors import BatonError
from baton.security.reload import Reloaded
from baton.security.tls import Pem, PemFiles, internal_files, server_credentials

Options = Sequence[tuple[str, Any]]


class Identity:
    """A certificate that both ends of every connection show, and whose authority both must share."""

    def __init__(self, files: PemFiles, name: str) -> None:
        """`name` is a DNS name that the certificates of all processes hold.

        Raises:
            BatonError: the files cannot be used.
        """
        self._pem = Reloaded(files.paths(), files.read)
        self._name = name

    @classmethod
    def from_settings(cls, settings: InternalTlsSettings) -> Identity | None:
        """
        Raises:
            BadSetting: files are missing or cannot be used.
        """
        files = internal_files(settings)
        if files is None:
            return None
        try:
            return cls(files, settings.internal_tls_name)
        except BatonError as error:
            raise BadSetting(f"--internal-tls-...: {error.message}", field="internal_tls_cert") from error

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials that refuse whoever shows no certificate of the same authority."""
        return server_credentials(self._pem.current)

    def open_channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """A channel to a process at `address` (host:port) that has such a certificate too."""
        # Processes move between addresses, so certificates name what they are part of, not where.
        options = (*options, ("grpc.ssl_target_name_override", self._name))

        def connect(pem: Pem) -> grpc.aio.Channel:
            credentials = grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)
            return grpc.aio.secure_channel(address, credentials, options=options)

        return _RenewedChannel(self._pem.current, connect)


class _RenewedChannel(grpc.aio.Channel):
    """A channel whose new calls use the certificate there is when they begin.

    gRPC's own keep the certificate they were made with. When it changes, calls that run go on over the
    connection they have; the next one opens another.
    """

    def __init__(self, pem: Callable[[], Pem], connect: Callable[[Pem], grpc.aio.Channel]) -> None:
        self._pem = pem
        self._connect = connect
        self._used = pem()
        self._channel = connect(self._used)

    def current(self) -> grpc.aio.Channel:
        now = self._pem()
        if now is not self._used:
            # Without references it closes itself; calls that run hold one.
            self._used, self._channel = now, self._connect(now)
        return self._channel

    def unary_unary(self, *method: Any, **serializers: Any) -> Any:
        return self._callable(lambda channel: channel.unary_unary(*method, **serializers))

    def unary_stream(self, *method: Any, **serializers: Any) -> Any:
        return self._callable(lambda channel: channel.unary_stream(*method, **serializers))

    def stream_unary(self, *method: Any, **serializers: Any) -> Any:
        return self._callable(lambda channel: channel.stream_unary(*method, **serializers))

    def stream_stream(self, *method: Any, **serializers: Any) -> Any:
        return self._callable(lambda channel: channel.stream_stream(*method, **serializers))

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current().channel_ready()

    async def __aenter__(self) -> _RenewedChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close(None)

    def _callable(self, make: Callable[[grpc.aio.Channel], Any]) -> Callable[..., Any]:
        channel = self.current()
        call_on_it = make(channel)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal channel, call_on_it
            if (now := self.current()) is not channel:
                channel, call_on_it = now, make(now)
            begun = call_on_it(*arguments, **options)
            begun.add_done_callback(_Holding(channel))
            return begun

        return call


class _Holding:
    """Keeps a channel alive for as long as a call on it runs."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def __call__(self, _call: object) -> None:
        del self._channel
