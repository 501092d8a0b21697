"""Who asks, how urgently, in which conversation and until when: from headers or gRPC metadata."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.errors import InvalidRequest, PermissionDenied
from baton.routing import Slo
from baton.security.access import ANYONE, Grant
from baton.security.quota import Quota

_MAX_NAME = 256

Header = Callable[[str], str]
"""A header by its lower-case name; empty when absent."""


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` is empty where tenants are not told apart, `session` where the request names none;
    `timeout_s` is how long the caller waits for the whole answer, from now; `quota` is what its API key
    may use, if it has one with limits. `traceparent` is the W3C trace context it sent, `arrived_s` the
    `time.monotonic()` at which it was read."""

    tenant: str
    slo: Slo
    session: str
    timeout_s: float
    quota: Quota | None = None
    traceparent: str = ""
    arrived_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Callers:
    """Reads who the caller is. `trust_tenant`: what stands before the router sets `x-tenant-id`."""

    trust_tenant: bool
    timeout_s: float

    def read(
        self,
        header: Header,
        grant: Grant = ANYONE,
        *,
        slo: Slo | None = None,
        service_tier: str | None = None,
    ) -> Caller:
        """`slo` and `service_tier` are what the request's body says: `slo` beats the header, which beats
        the tier, of which `flex` means batch.

        Raises:
            InvalidRequest: naming the header that cannot be used.
            PermissionDenied: the header names another tenant than the one the API key belongs to.
        """
        if slo is None:
            slo = _slo(header("x-baton-slo")) or ("batch" if service_tier == "flex" else "interactive")
        return Caller(
            tenant=self._tenant(header, grant),
            slo=slo,
            session=_name("x-session-id", header),
            timeout_s=min(self.timeout_s, _seconds("x-request-timeout", header)),
            quota=grant.quota,
            traceparent=header("traceparent"),
        )

    def _tenant(self, header: Header, grant: Grant) -> str:
        if not self.trust_tenant:
            return grant.tenant
        named = _name("x-tenant-id", header)
        if grant.tenant and named not in ("", grant.tenant):
            raise PermissionDenied(
                f"x-tenant-id: this API key belongs to tenant {grant.tenant!r}, not {named[:64]!r}",
                field="x-tenant-id",
            )
        return grant.tenant or named


def _slo(value: str) -> Slo | None:
    match value:
        case "":
            return None
        case "interactive":
            return "interactive"
        case "batch":
            return "batch"
    raise InvalidRequest(
        f"x-baton-slo: must be interactive or batch, got {value[:64]!r}", field="x-baton-slo"
    )


def _name(name: str, header: Header) -> str:
    value = header(name)
    if len(value) > _MAX_NAME:
        raise InvalidRequest(f"{name}: at most {_MAX_NAME} characters", field=name)
    return value


def _seconds(name: str, header: Header) -> float:
    value = header(name)
    if not value:
        return math.inf
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest(f"{name}: must be seconds above 0, got {value[:64]!r}", field=name)
    return seconds
