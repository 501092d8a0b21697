"""Does every preset render into what Kubernetes takes, from the oldest version supported to the newest?"""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache

import kubernetes_validate
import pytest
import yaml

from tests.unit.charts.rendering import CHART, EVERYTHING, HELM, PLANNER, PRESETS, Manifest, manifests

VERSIONS = ("1.28", "1.32", "1.36")
#: Kinds that operators bring, for which Kubernetes itself has no schema.
OPERATORS = {"Certificate", "ServiceMonitor", "HTTPRoute", "GRPCRoute", "ScaledObject"}


@cache
def complaint(manifest: str, version: str) -> str | None:
    """What Kubernetes `version` has against the manifest, given as JSON; the same one is checked once."""
    body = json.loads(manifest)
    try:
        kubernetes_validate.validate(body, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError as error:
        return None if body["kind"] in OPERATORS else str(error.message)
    except kubernetes_validate.ValidationError as error:
        return f"{list(error.path)}: {error.message}"
    return None


def complaints(found: list[Manifest], version: str) -> list[str]:
    said = [(one, complaint(json.dumps(one.body, sort_keys=True), version)) for one in found]
    return [f"{one} on {version}: {what}" for one, what in said if what]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_preset_is_valid(preset: str | None, version: str) -> None:
    assert complaints(manifests(preset), version) == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [EVERYTHING, PLANNER])
def test_everything_at_once_is_valid(values: tuple[str, ...], version: str) -> None:
    assert complaints(manifests(None, values), version) == []


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_lint_has_nothing_to_say(preset: str | None) -> None:
    files = [] if preset is None else ["--values", str(CHART / preset)]
    done = subprocess.run(
        [HELM, "lint", "--strict", CHART, *files], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_its_ratio_and_why(preset: str) -> None:
    content = (CHART / preset).read_text()
    values = yaml.safe_load(content)
    found = re.search(r"^# Ratio (\d+) : (\d+)", content, re.MULTILINE)
    assert found is not None
    prefill, decode = int(found[1]), int(found[2])
    assert values["prefill"]["replicas"] * decode == values["decode"]["replicas"] * prefill


#: What a value must come with, where switching it alone is refused.
COMPANIONS = {
    **{
        f"{path}.certManager.enabled": (f"{path}.certManager.issuerRef.name=ca",)
        for path in ("tls", "internalTls")
    },
    "ingress.enabled": ("ingress.hosts[0].host=llm.example.com",),
    "gateway.httpRoute.enabled": ("gateway.httpRoute.parentRefs[0].name=gate",),
    "gateway.grpcRoute.enabled": ("gateway.grpcRoute.parentRefs[0].name=gate",),
    **{
        f"{role}.hpa.enabled": (
            f"{role}.hpa.metrics[0].type=Resource",
            f"{role}.hpa.metrics[0].resource.name=cpu",
            f"{role}.hpa.metrics[0].resource.target.type=Utilization",
            f"{role}.hpa.metrics[0].resource.target.averageUtilization=50",
        )
        for role in ("prefill", "decode")
    },
    **{
        f"{role}.keda.enabled": (f"{role}.keda.triggers[0].type=cpu",)
        for role in ("router", "prefill", "decode")
    },
}


def booleans(values: object, path: str = "") -> dict[str, bool]:
    """Every boolean of a values file by its path."""
    if isinstance(values, bool):
        return {path: values}
    if not isinstance(values, dict):
        return {}
    below = (booleans(value, f"{path}.{name}".lstrip(".")) for name, value in values.items())
    return {name: value for one in below for name, value in one.items()}


SWITCHES = booleans(yaml.safe_load((CHART / "values.yaml").read_text()))


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_what_is_rendered_and_it_stays_valid(switch: str) -> None:
    companions = COMPANIONS.get(switch, ())
    if switch.startswith("modelCache"):
        companions = ("model.uri=s3://bucket/model",)
    before = manifests(None, companions)
    after = manifests(None, (*companions, f"{switch}={str(not SWITCHES[switch]).lower()}"))
    assert after != before
    assert complaints(after, VERSIONS[-1]) == []
