"""What `helm template` makes of the chart, as tests look at it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[3] / "charts" / "baton"
HELM = Path(sys.executable).parent / "helm"
PRESETS = tuple(sorted(path.name for path in CHART.glob("values-*.yaml")))
RELEASE = "trial"

#: Values that switch everything on at once.
EVERYTHING = (
    *("redis.bundled.enabled=true", "modelCache.enabled=true", "model.uri=hf://org/name@main"),
    *("rdma.enabled=true", "rdma.resources.rdma/nics=1", "rdma.netDevices=mlx5_0:1", "rdma.transports=rc"),
    *("ingress.enabled=true", "ingress.hosts[0].host=llm.example.com"),
    *("gateway.httpRoute.enabled=true", "gateway.httpRoute.parentRefs[0].name=gate"),
    *("gateway.grpcRoute.enabled=true", "gateway.grpcRoute.parentRefs[0].name=gate"),
    *("serviceMonitor.enabled=true", "grafana.dashboards.enabled=true", "networkPolicy.enabled=true"),
    *("router.hpa.enabled=true", "decode.hpa.enabled=true", "decode.hpa.metrics[0].type=Resource"),
    *("decode.hpa.metrics[0].resource.name=cpu", "decode.hpa.metrics[0].resource.target.type=Utilization"),
    *("decode.hpa.metrics[0].resource.target.averageUtilization=60",),
    *("tls.certManager.enabled=true", "tls.certManager.issuerRef.name=ca", "apiKeys.existingSecret=people"),
    *("internalTls.certManager.enabled=true", "internalTls.certManager.issuerRef.name=inside"),
    *("prefill.keda.enabled=true", "prefill.keda.triggers[0].type=prometheus", "ucx.UCX_LOG_LEVEL=info"),
    *("otlpEndpoint=http://otel-collector:4317", "logFormat=text", "decode.runtimeClassName=nvidia"),
)

#: Values of a planner and all it needs; it cannot be together with what else sets replicas.
PLANNER = (
    *("planner.enabled=true", "planner.replicas=2", "planner.config.budgetGpus=8"),
    *(
        "networkPolicy.enabled=true",
        "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.name=monitoring",
    ),
    *("tls.existingSecret=public", "internalTls.existingSecret=inside", "apiKeys.existingSecret=people"),
    *("device=cuda", r"prefill.resources.limits.nvidia\.com/gpu=2"),
)


class Refused(Exception):
    """Helm did not render; what it said."""


@dataclass(frozen=True)
class Manifest:
    """One rendered object."""

    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def pod(self) -> dict[str, Any] | None:
        """The pod or pod template in it, if it has one."""
        if self.kind == "Pod":
            return self.body
        template: dict[str, Any] | None = self.body.get("spec", {}).get("template")
        return template

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@cache
def text(preset: str | None = None, values: tuple[str, ...] = (), release: str = RELEASE) -> str:
    """What `helm template` prints. `values` are arguments of --set.

    Raises:
        Refused: the values do not fit the chart.
    """
    assert HELM.exists(), "no helm: `make .venv/bin/helm` gets it"
    files = [] if preset is None else ["--values", str(CHART / preset)]
    given = [word for value in values for word in ("--set", value)]
    done = subprocess.run(
        [HELM, "template", release, CHART, "--namespace", "space", *files, *given],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


def manifests(*arguments: Any, **named: Any) -> list[Manifest]:
    """The objects that `text` with these arguments holds."""
    return [Manifest(body) for body in yaml.safe_load_all(text(*arguments, **named)) if body]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Its variables; where a value comes from elsewhere, where from."""
    return {item["name"]: item.get("value", str(item.get("valueFrom"))) for item in container.get("env", [])}


def only(found: list[Manifest], kind: str, name: str) -> Manifest:
    (manifest,) = (one for one in found if one.kind == kind and one.name == name)
    return manifest
