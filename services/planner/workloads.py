"""The Deployments that workers are pods of: how many there are asked for, and Events on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from kubernetes.aio.client import (
    ApiClient,
    AppsV1Api,
    CoreV1Api,
    CoreV1Event,
    V1EventSource,
    V1ObjectMeta,
    V1ObjectReference,
)

from baton.routing import Role

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_MESSAGE_LIMIT = 1024


@dataclass(frozen=True)
class Workload:
    """A Deployment whose pods start in one role: its name and how many pods it is to have."""

    name: str
    replicas: int

    def has(self, worker_id: str) -> bool:
        """Whether a worker is one of its pods, which are called NAME-TEMPLATE-POD."""
        return worker_id.rpartition("-")[0].rpartition("-")[0] == self.name


class Deployments:
    """Deployments of one namespace, `names` by the role of their workers.

    Every call raises kubernetes.aio.client.ApiException, aiohttp.ClientError or TimeoutError where the API
    server refuses or does not answer.
    """

    def __init__(self, client: ApiClient, namespace: str, names: Mapping[Role, str], reporter: str) -> None:
        """`reporter` is the name of this process in Events."""
        self._apps = AppsV1Api(client)
        self._core = CoreV1Api(client)
        self._namespace = namespace
        self._names = names
        self._reporter = reporter

    async def read(self) -> Mapping[Role, Workload]:
        """The Deployments by the role in which their workers start."""
        found = {}
        for role, name in self._names.items():
            scale = await self._apps.read_namespaced_deployment_scale(
                name, self._namespace, _request_timeout=_TIMEOUT_S
            )
            found[role] = Workload(name, (scale.spec.replicas if scale.spec is not None else 0) or 0)
        return found

    async def scale(self, workload: Workload, replicas: int) -> None:
        """Ask for so many workers."""
        await self._apps.patch_namespaced_deployment_scale(
            workload.name,
            self._namespace,
            {"spec": {"replicas": replicas}},
            _content_type="application/merge-patch+json",
            _request_timeout=_TIMEOUT_S,
        )

    async def tell(self, workload: Workload | None, kind: str, reason: str) -> None:
        """Write a decision down where people look for it. `kind` is a word in CamelCase."""
        about = workload.name if workload is not None else self._names[Role.DECODE]
        now = datetime.now(UTC)
        await self._core.create_namespaced_event(
            self._namespace,
            CoreV1Event(
                metadata=V1ObjectMeta(generate_name=f"{about}-", namespace=self._namespace),
                involved_object=V1ObjectReference(
                    api_version="apps/v1", kind="Deployment", name=about, namespace=self._namespace
                ),
                reason=kind,
                message=reason[:_MESSAGE_LIMIT],
                type="Normal",
                action=kind,
                first_timestamp=now,
                last_timestamp=now,
                count=1,
                event_time=None,
                source=V1EventSource(component="baton-planner"),
                reporting_component="baton-planner",
                reporting_instance=self._reporter,
            ),
            _request_timeout=_TIMEOUT_S,
        )
