"""How one process opens a gRPC channel to another, and the options both ends of it share."""

from __future__ import annotations

import grpc

from baton.config import InternalTlsSettings
from baton.security.identity import Identity

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message either end takes: a long prompt's token ids, or a piece of an index snapshot."""

# A peer that vanished without closing its socket (host lost, network cut) is found after 15 s at
# most, on busy and on idle connections alike: streams are leases here, so a half-open one would
# hold KV blocks for ever. Both ends ping, because either end can be the one left behind. A process that
# is stopped still acknowledges packets: of it only the missing answer to a ping tells, for which gRPC
# waits a minute whatever the timeout of keepalive, unless told otherwise.
SHARED_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

# Reconnecting to a restarted process should take as long as its start, not a back-off grown in the
# meantime. Peers are addressed directly: a proxy meant for the internet must not come between.
_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *SHARED_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
)


_identity: Identity | None = None


def use_internal_tls(settings: InternalTlsSettings) -> None:
    """From here on this process's channels and servers are encrypted, and both ends show who they are.

    Call it once, first thing in a main: so no channel can be forgotten. Without files named in the settings
    nothing changes.

    Raises:
        BadSetting: files are missing or cannot be used.
    """
    global _identity
    _identity = Identity.from_settings(settings)


def internal_credentials() -> grpc.ServerCredentials | None:
    """What a server shows and asks for that is there for other processes; None: nothing."""
    return _identity.server_credentials() if _identity is not None else None


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to another process, at `address` (host:port), that connects on first use and reconnects
    by itself.

    The caller closes it, best as `async with open_channel(address) as channel`.
    """
    if _identity is not None:
        return _identity.open_channel(address, _CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def open_public_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """As `open_channel`, to a router's public port; without `credentials` in the clear."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
