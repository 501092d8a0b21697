"""Is a wrong value refused by its name, and does a right one arrive as it was meant?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from baton.config import resolve
from charts import schema
from tests.unit.charts.rendering import (
    CHART,
    Manifest,
    Refused,
    containers,
    environment,
    manifests,
    only,
    text,
)


def decode(*values: str) -> Manifest:
    return only(manifests(None, values), "Deployment", "trial-baton-decode")


def pod(*values: str) -> dict[str, object]:
    found = decode(*values).pod
    assert found is not None
    spec: dict[str, object] = found["spec"]
    return spec


def settings(*values: str) -> dict[str, str]:
    found = decode(*values).pod
    assert found is not None
    return environment(found["spec"]["containers"][0])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("prefil.replicas=2", "'prefil'"),
        ("prefill.replica=2", "'replica'"),
        ("prefill.replicas=two", "/prefill/replicas"),
        ("prefill.replicas=-1", "/prefill/replicas"),
        ("router.config.maxRuning=3", "'maxRuning'"),
        ("router.config.policy=fastest", "/router/config/policy"),
        ("router.config.batchShare=1.5", "/router/config/batchShare"),
        ("router.service.type=Loadbalancer", "/router/service/type"),
        ("decode.config.kvBytes=lots", "/decode/config/kvBytes"),
        ("decode.config.port=1", "'port'"),
        ("decode.hpa.maxreplicas=3", "'maxreplicas'"),
        ("device=gpu", "/device"),
        ("model.uri=org/name", "/model/uri"),
        ("model.dtype=int4", "/model/dtype"),
        ("model.uri2=x", "'uri2'"),
        ("ucx.TLS=rc", "'TLS'"),
        ("gateway.httpRoute.hostname=x", "'hostname'"),
        ("networkPolicy.enable=true", "'enable'"),
        ("decode.extraEnv[0].nme=X", "'nme'"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
    ],
)
def test_a_wrong_value_is_refused_by_name(value: str, named: str) -> None:
    with pytest.raises(Refused, match=re.escape(named)):
        text(None, (value,))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("decode.replicas=0",), "decode.replicas"),
        (("ingress.enabled=true",), "ingress.hosts"),
        (("gateway.grpcRoute.enabled=true",), "gateway.grpcRoute.parentRefs"),
        (("prefill.hpa.enabled=true",), "prefill.hpa.metrics"),
        (("router.hpa.enabled=true", "router.keda.enabled=true"), "router.hpa and router.keda"),
        (("redis.url=redis://x", "redis.bundled.enabled=true"), "redis: give one of"),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_the_reason(
    values: tuple[str, ...], said: str
) -> None:
    with pytest.raises(Refused, match=re.escape(said)):
        text(None, values)


def test_the_schema_is_that_of_the_settings() -> None:
    written = json.loads(schema.SCHEMA.read_text())
    assert written == schema.values(), "baton/config.py or charts/schema.py changed: `make chart-schema`"


def test_objects_are_closed_unless_kubernetes_or_the_user_names_their_keys() -> None:
    def open_objects(part: object, path: str) -> list[str]:
        if not isinstance(part, dict):
            return []
        here = [path] if part.get("properties") and part.get("additionalProperties") is not False else []
        below = (open_objects(value, f"{path}/{name}") for name, value in part.items())
        return [*here, *(one for some in below for one in some)]

    assert open_objects(json.loads((CHART / "values.schema.json").read_text()), "") == []


def given_in_a_file(folder: Path, **config: object) -> dict[str, str]:
    """The decode worker's variables with these settings in a values file."""
    file = folder / "values.json"
    file.write_text(json.dumps({"decode": {"config": config}}))
    found = only(manifests(str(file)), "Deployment", "trial-baton-decode").pod
    assert found is not None
    return environment(found["spec"]["containers"][0])


@pytest.mark.parametrize("section", ["engine", "worker"])
def test_settings_names_become_their_variables(section: str, tmp_path: Path) -> None:
    fitting = {"boolean": True, "string": "x", "number": 1.5, "integer": 16}
    config = {
        name: described["enum"][0]
        if "enum" in described
        else described.get("maximum", fitting[described["type"]])
        for name, described in schema.settings(section).items()
    }
    given = {name: value for name, value in given_in_a_file(tmp_path, **config).items() if "BATON" in name}
    _, effective = resolve(environ=given)
    arrived = {schema.camel(one.name): one for one in effective if schema.camel(one.name) in config}
    assert arrived.keys() == config.keys()
    for name, one in arrived.items():
        assert one.source.startswith("env "), name
        assert one.value == config[name], name


def test_large_and_fractional_numbers_arrive_whole(tmp_path: Path) -> None:
    given = given_in_a_file(tmp_path, kvBytes=214748364800, gpuMemoryUtilization=0.85)
    assert given["BATON_KV_BYTES"] == "214748364800"
    assert given["BATON_GPU_MEMORY_UTILIZATION"] == "0.85"


@pytest.mark.parametrize(
    ("uri", "model", "name", "volume"),
    [
        ("file:///models/baton-small", "/models/baton-small", "baton-small", None),
        ("pvc://weights/llama/8b", "/models/llama/8b", "8b", "weights"),
        ("hf://org/name", r"/models/name-[0-9a-f]{8}", "name", "emptyDir"),
        ("hf://org/name@v2", r"/models/name-[0-9a-f]{8}", "name", "emptyDir"),
        ("s3://bucket/some/name/", r"/models/name-[0-9a-f]{8}", "name", "emptyDir"),
    ],
)
def test_a_model_uri_becomes_a_folder_a_name_and_a_volume(
    uri: str, model: str, name: str, volume: str | None
) -> None:
    given = settings(f"model.uri={uri}")
    assert re.fullmatch(model, given["BATON_MODEL"])
    assert given["BATON_SERVED_MODEL_NAME"] == name
    spec = pod(f"model.uri={uri}")
    models = [one for one in spec["volumes"] if one["name"] == "models"]  # type: ignore[attr-defined]
    if volume is None:
        assert models == []
    else:
        assert volume in json.dumps(models)
    fetches = [one["args"] for one in spec.get("initContainers", [])]  # type: ignore[attr-defined]
    assert fetches == ([["fetch", uri, given["BATON_MODEL"]]] if volume == "emptyDir" else [])


def test_revisions_of_a_model_have_folders_of_their_own() -> None:
    assert (
        settings("model.uri=hf://org/name@a")["BATON_MODEL"]
        != settings("model.uri=hf://org/name@b")["BATON_MODEL"]
    )


def test_a_router_copies_no_weights() -> None:
    router = only(manifests(None, ("model.uri=hf://org/name",)), "Deployment", "trial-baton-router")
    assert router.pod is not None
    assert router.pod["spec"]["initContainers"][0]["args"][-1] == "--config-only"


def test_the_release_names_and_the_device_choose_images() -> None:
    values = ("device=cuda", "image.registry=registry.example.com/llm", "image.tag=v7")
    (container,) = (one for one in containers({"spec": pod(*values)}))
    assert container["image"] == "registry.example.com/llm/baton-worker:v7"
    (container,) = (one for one in containers({"spec": pod("decode.image.digest=sha256:ab")}))
    assert container["image"] == "baton-worker-cpu@sha256:ab"


def test_the_redis_url_stays_out_of_manifests_that_many_may_read() -> None:
    found = manifests(None, ("redis.url=rediss://:secret@redis:6379/0",))
    assert [str(one) for one in found if "secret@" in json.dumps(one.body)] == ["Secret trial-baton-redis"]


def test_rdma_gives_the_worker_nics_memory_locks_and_ucx_its_variables() -> None:
    values = (
        *("rdma.enabled=true", "rdma.resources.rdma/nics=2", "rdma.netDevices=mlx5_0:1"),
        *("decode.resources.limits.nvidia\\.com/gpu=1", "ucx.UCX_MAX_RNDV_RAILS=2"),
    )
    found = decode(*values).pod
    assert found is not None
    (container,) = found["spec"]["containers"]
    assert container["resources"]["limits"] == {"rdma/nics": 2, "nvidia.com/gpu": 1}
    assert container["resources"]["requests"]["rdma/nics"] == 2
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    given = environment(container)
    assert (given["UCX_NET_DEVICES"], given["UCX_MAX_RNDV_RAILS"]) == ("mlx5_0:1", "2")
