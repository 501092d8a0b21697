"""Do the rendered objects fit each other and the processes they run?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import pytest

from baton.cli.main import main
from baton.config import BadSetting, resolve
from tests.unit.charts.rendering import (
    CHART,
    EVERYTHING,
    PLANNER,
    PRESETS,
    Manifest,
    Refused,
    containers,
    environment,
    manifests,
    only,
)

ROOT = CHART.parents[1]
RENDERS: list[tuple[str | None, tuple[str, ...]]] = [
    *((preset, ()) for preset in (None, *PRESETS)),
    (None, EVERYTHING),
    (None, PLANNER),
]
every_render = pytest.mark.parametrize(("preset", "values"), RENDERS, ids=lambda value: str(value)[:20])


def pods(found: list[Manifest]) -> Iterator[tuple[Manifest, dict[str, Any]]]:
    return ((one, one.pod) for one in found if one.pod is not None)


def own_containers(found: list[Manifest]) -> Iterator[tuple[Manifest, dict[str, Any]]]:
    """Containers of our images."""
    for one, pod in pods(found):
        for container in containers(pod):
            if "baton-" in container["image"].split(":")[0]:
                yield one, container


def named_ports(pod: dict[str, Any]) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for container in containers(pod)
        for port in container.get("ports", [])
    }


def selects(selector: dict[str, str], pod: dict[str, Any]) -> bool:
    return selector.items() <= pod["metadata"]["labels"].items()


@every_render
def test_every_variable_is_a_setting_with_a_value_it_can_take(
    preset: str | None, values: tuple[str, ...]
) -> None:
    for one, container in own_containers(manifests(preset, values)):
        environ = {name: value for name, value in environment(container).items() if name.startswith("BATON_")}
        try:
            resolve(environ=environ)
        except BadSetting as error:
            pytest.fail(f"{one}: {error.message}")


@every_render
def test_every_container_runs_a_command_that_baton_has(preset: str | None, values: tuple[str, ...]) -> None:
    for one, container in own_containers(manifests(preset, values)):
        name, *arguments = container["args"]
        command = main.commands[name]
        known = {option for item in command.params if isinstance(item, click.Option) for option in item.opts}
        given = {word for word in arguments if word.startswith("--")}
        assert given <= known, f"{one}: {container['args']}"


@every_render
def test_pods_are_confined(preset: str | None, values: tuple[str, ...]) -> None:
    for one, pod in pods(manifests(preset, values)):
        spec = pod["spec"]
        assert spec["enableServiceLinks"] is False, f"{one}: Services named baton- would become settings"
        assert spec["automountServiceAccountToken"] is (one.name == "trial-baton-planner"), one
        assert spec["securityContext"]["runAsNonRoot"] is True, one
        for container in containers(pod):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, one
            assert security["allowPrivilegeEscalation"] is False, one
            assert security["capabilities"]["drop"] == ["ALL"], one
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, one


@every_render
def test_names_are_unique_and_labels_the_same_everywhere(preset: str | None, values: tuple[str, ...]) -> None:
    found = manifests(preset, values)
    assert len({str(one) for one in found}) == len(found)
    for one in found:
        labels = one.body["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "baton", one
        assert labels["app.kubernetes.io/instance"] == "trial", one
        assert one.name.startswith("trial-baton"), one
        assert one.body["metadata"]["namespace"] == "space", one


@every_render
def test_selectors_choose_the_pods_they_are_named_for(preset: str | None, values: tuple[str, ...]) -> None:
    found = manifests(preset, values)
    templates = {one.name: pod for one, pod in pods(found)}
    for one in found:
        spec = one.body.get("spec", {})
        selector = spec.get("selector", {}) if one.kind == "Service" else spec.get("podSelector")
        if one.kind in ("Deployment", "PodDisruptionBudget"):
            selector = spec["selector"]
        if selector is None or one.kind == "ServiceMonitor":
            continue
        selector = selector.get("matchLabels", selector)
        chosen = [name for name, pod in templates.items() if selects(selector, pod)]
        assert chosen == [one.name.removesuffix("-metrics")], one


@every_render
def test_ports_and_probes_exist(preset: str | None, values: tuple[str, ...]) -> None:
    found = manifests(preset, values)
    templates = {one.name: pod for one, pod in pods(found)}
    for one in found:
        target = templates.get(one.name.removesuffix("-metrics"))
        if one.kind == "Service":
            assert target is not None
            for port in one.body["spec"]["ports"]:
                assert port["targetPort"] in named_ports(target), one
        if one.kind == "NetworkPolicy":
            assert target is not None
            for rule in one.body["spec"]["ingress"]:
                assert {port["port"] for port in rule.get("ports", [])} <= named_ports(target).keys(), one
    for one, pod in pods(found):
        ports = named_ports(pod)
        for container in containers(pod):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for how in ("grpc", "httpGet", "tcpSocket"):
                    if check := container.get(probe, {}).get(how):
                        assert check["port"] in {*ports, *ports.values()}, f"{one} {probe}"


@every_render
def test_processes_listen_where_their_ports_say(preset: str | None, values: tuple[str, ...]) -> None:
    variables = {
        "router": {"BATON_PORT": "http", "BATON_GRPC_PORT": "grpc", "BATON_METRICS_PORT": "metrics"},
        "kvstore": {"BATON_KVSTORE_PORT": "grpc", "BATON_METRICS_PORT": "metrics"},
        "prefill": {"BATON_WORKER_PORT": "grpc", "BATON_METRICS_PORT": "metrics"},
        "decode": {"BATON_WORKER_PORT": "grpc", "BATON_METRICS_PORT": "metrics"},
    }
    found = manifests(preset, values)
    for component, ports in variables.items():
        pod = only(found, "Deployment", f"trial-baton-{component}").pod
        assert pod is not None
        given = environment(pod["spec"]["containers"][0])
        assert {name: int(given[name]) for name in ports} == {
            name: named_ports(pod)[port] for name, port in ports.items()
        }
    address = environment(only(found, "Deployment", "trial-baton-decode").pod["spec"]["containers"][0])
    host, port = address["BATON_KVSTORE"].split(":")
    (served,) = (
        one["port"]
        for one in only(found, "Service", host).body["spec"]["ports"]
        if one["targetPort"] == "grpc"
    )
    assert int(port) == served


@every_render
def test_a_pod_has_longer_to_stop_than_its_requests_have_to_finish(
    preset: str | None, values: tuple[str, ...]
) -> None:
    found = manifests(preset, values)
    for component, variable in {
        "router": "BATON_STOP_GRACE_S",
        "prefill": "BATON_DRAIN_TIMEOUT_S",
        "decode": "BATON_DRAIN_TIMEOUT_S",
    }.items():
        pod = only(found, "Deployment", f"trial-baton-{component}").pod
        assert pod is not None
        (container,) = pod["spec"]["containers"]
        before = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0])[-1]
        needed = float(environment(container)[variable]) + float(before)
        assert pod["spec"]["terminationGracePeriodSeconds"] >= needed + 10


def test_who_is_scaled_by_something_else_has_no_replicas() -> None:
    found = manifests(None, EVERYTHING)
    scaled = {
        one.body["spec"]["scaleTargetRef"]["name"]
        for one in found
        if one.kind in ("HorizontalPodAutoscaler", "ScaledObject")
    }
    assert scaled == {"trial-baton-router", "trial-baton-prefill", "trial-baton-decode"}
    for name in scaled:
        assert "replicas" not in only(found, "Deployment", name).body["spec"]


def test_without_a_planner_nothing_may_ask_the_kubernetes_api() -> None:
    kinds = {one.kind for one in manifests(None, EVERYTHING)}
    assert not {kind for kind in kinds if "Role" in kind}


def test_the_planner_may_scale_the_workers_of_its_release_and_little_else() -> None:
    found = manifests(None, PLANNER)
    (binding,) = (one.body for one in found if one.kind == "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == ["trial-baton-planner"]
    assert {one.kind for one in found if "ClusterRole" in one.kind} == set()
    rules = only(found, "Role", binding["roleRef"]["name"]).body["rules"]
    assert {(*rule["resources"], *rule.get("resourceNames", [])): rule["verbs"] for rule in rules} == {
        ("deployments/scale", "trial-baton-prefill", "trial-baton-decode"): ["get", "patch"],
        ("leases", "trial-baton-planner"): ["get", "update"],
        ("events",): ["create"],
    }
    pod = only(found, "Deployment", "trial-baton-planner").pod
    assert pod is not None
    assert pod["spec"]["serviceAccountName"] == "trial-baton-planner"
    names = {one.name for one in found if one.kind == "Deployment"}
    variables = environment(pod["spec"]["containers"][0])
    assert {variables["BATON_PREFILL_WORKLOAD"], variables["BATON_DECODE_WORKLOAD"]} <= names
    assert (variables["BATON_GPUS_PER_PREFILL"], variables["BATON_GPUS_PER_DECODE"]) == ("2", "1")


def test_a_planner_beside_an_autoscaler_of_the_workers_is_refused() -> None:
    with pytest.raises(Refused, match=r"decode\.hpa"):
        manifests(None, ("planner.enabled=true", "decode.hpa.enabled=true"))


def test_long_release_names_stay_within_what_a_label_may_have() -> None:
    for one in manifests(release="a" * 53):
        assert len(one.name) <= 63, one
        assert all(len(value) <= 63 for value in one.body["metadata"]["labels"].values()), one
