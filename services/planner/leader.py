"""One planner acts at a time: the one that holds the Lease."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Protocol

import aiohttp
from kubernetes.aio.client import (
    ApiClient,
    ApiException,
    CoordinationV1Api,
    V1Lease,
    V1LeaseSpec,
    V1ObjectMeta,
)

log = logging.getLogger(__name__)

_LEASE_S = 15
_HELD_S = 10.0
_RETRY_S = 2.0
_CONFLICT = 409
_NOT_FOUND = 404


class Leadership(Protocol):
    """Whether this process is the one that acts."""

    @property
    def leading(self) -> bool:
        """Whether it is now."""

    async def run(self) -> None:
        """Seek and keep the lead until cancelled."""


class Alone:
    """There is no other planner."""

    leading = True

    async def run(self) -> None:
        await asyncio.Event().wait()


class LeaseLeadership:
    """Leads for 10 s after each renewal of the Lease; others may take it over after 15 s in which it did not
    change. So a planner that is cut off from the API server stops before another one begins, and no two
    clocks are compared: each counts from when it asked or saw the change itself."""

    def __init__(self, client: ApiClient, namespace: str, lease: str, identity: str) -> None:
        self._api = CoordinationV1Api(client)
        self._namespace = namespace
        self._name = lease
        self._identity = identity
        self._held_until_s = 0.0
        self._seen: tuple[object, ...] = ()
        self._seen_s = 0.0

    @property
    def leading(self) -> bool:
        return time.monotonic() < self._held_until_s

    async def run(self) -> None:
        led = False
        try:
            while True:
                try:
                    async with asyncio.timeout(_HELD_S):
                        await self._seek()
                except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
                    log.warning("the Lease %s cannot be renewed: %s", self._name, _said(error))
                if self.leading is not led:
                    led = self.leading
                    log.info("leading" if led else "not leading any more")
                await asyncio.sleep(_RETRY_S)
        finally:
            self._held_until_s = 0.0
            if led:
                await self._give_up()

    async def _seek(self) -> None:
        """Take the Lease if it is free or has not changed for too long, and renew it where it is ours."""
        asked_s = time.monotonic()
        lease = await self._read()
        if lease is not None and lease.spec is not None:
            holder, renewed = lease.spec.holder_identity, lease.spec.renew_time
            if (holder, renewed) != self._seen:
                self._seen, self._seen_s = (holder, renewed), asked_s
            if holder and holder != self._identity and asked_s - self._seen_s < _LEASE_S:
                self._held_until_s = 0.0
                return
        try:
            await self._write(lease, self._identity)
        except ApiException as error:
            if error.status != _CONFLICT:
                raise
            self._held_until_s = 0.0
            return
        self._held_until_s = asked_s + _HELD_S

    async def _give_up(self) -> None:
        """Let the next planner begin at once."""
        try:
            async with asyncio.timeout(_RETRY_S):
                lease = await self._read()
                if lease is not None and lease.spec and lease.spec.holder_identity == self._identity:
                    await self._write(lease, "")
        except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("the Lease %s is left to run out: %s", self._name, _said(error))

    async def _read(self) -> V1Lease | None:
        try:
            return await self._api.read_namespaced_lease(self._name, self._namespace)
        except ApiException as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    async def _write(self, lease: V1Lease | None, holder: str) -> None:
        """Write the Lease as it was read, but for its holder; refused if somebody else wrote meanwhile."""
        # Kubernetes wants all six digits of the microseconds, which Python leaves out where they are zero.
        now = datetime.now(UTC)
        now = now.replace(microsecond=now.microsecond or 1)
        if lease is None:
            spec = V1LeaseSpec(
                holder_identity=holder, lease_duration_seconds=_LEASE_S, acquire_time=now, renew_time=now
            )
            body = V1Lease(metadata=V1ObjectMeta(name=self._name, namespace=self._namespace), spec=spec)
            await self._api.create_namespaced_lease(self._namespace, body)
            return
        spec = lease.spec = lease.spec or V1LeaseSpec()
        if spec.holder_identity != holder:
            spec.acquire_time = now
            spec.lease_transitions = (spec.lease_transitions or 0) + 1
        spec.holder_identity, spec.renew_time = holder, now
        spec.lease_duration_seconds = _LEASE_S
        await self._api.replace_namespaced_lease(self._name, self._namespace, lease)


def _said(error: BaseException) -> str:
    if isinstance(error, ApiException):
        return f"the API server answers {error.status} {error.reason}"
    return str(error) or type(error).__name__
