"""Which processes does `baton up` start, and with which flags?"""

import json
import socket
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from baton.cli import cluster
from baton.cli.cluster import Cluster, plan_cluster
from baton.cli.preflight import CannotStart, check_memory
from baton.config import resolve
from baton.errors import UnsupportedModel


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model with 1000 bytes of bfloat16 weights."""
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path


def plan(model: Path | str, **flags: object) -> Cluster:
    given = {"model": str(model), "port": 0, "grpc_port": 0, **flags}
    settings, effective = resolve(given, {})
    return plan_cluster(settings, {row.name for row in effective if row.source != "default"})


def arguments(planned: Cluster) -> Mapping[str, dict[str, str]]:
    """Flag to value, by process; flags without a value are left out."""
    return {
        spec.name: {
            word: value
            for word, value in pairwise([*spec.arguments, "--"])
            if word.startswith("--") and not value.startswith("--")
        }
        for spec in planned.processes
    }


def test_the_default_is_one_prefill_and_one_decode_worker(model: Path) -> None:
    planned = plan(model)
    modules = {spec.name: spec.module for spec in planned.processes}
    assert modules == {
        "kvstore": "services.kvstore",
        "router": "services.router",
        "prefill-0": "services.prefill",
        "decode-0": "services.decode",
    }
    stages = {spec.role: spec.stop_stage for spec in planned.processes}
    assert stages["router"] < stages["prefill"] == stages["decode"] < stages["kvstore"]


@pytest.mark.parametrize(
    ("flags", "workers"),
    [
        ({"hybrid": 2}, ["hybrid-0", "hybrid-1"]),
        ({"hybrid": 1, "prefill": 1}, ["prefill-0", "decode-0", "hybrid-0"]),
        ({"prefill": 2, "decode": 1}, ["prefill-0", "prefill-1", "decode-0"]),
        ({"prefill": 0}, ["decode-0"]),
    ],
)
def test_hybrid_alone_replaces_the_default(model: Path, flags: dict[str, int], workers: list[str]) -> None:
    named = [spec.name for spec in plan(model, **flags).processes]
    assert named[2:] == workers


def test_several_routers_share_two_ports_and_each_has_one_alone(model: Path) -> None:
    planned = plan(model, routers=3)
    routers = [spec for spec in planned.processes if spec.role == "router"]
    assert [spec.name for spec in routers] == ["router-0", "router-1", "router-2"]
    assert all("--share-ports" in spec.arguments for spec in routers)
    found = [arguments(planned)[spec.name] for spec in routers]
    for flag, different in (("--port", 1), ("--grpc-port", 1), ("--metrics-port", 3)):
        assert len({ports[flag] for ports in found}) == different
    (alone,) = [spec for spec in plan(model).processes if spec.role == "router"]
    assert "--share-ports" not in alone.arguments


def test_a_cluster_that_could_not_decode_is_refused(model: Path) -> None:
    with pytest.raises(CannotStart, match="--decode"):
        plan(model, decode=0)


def test_processes_get_what_was_given_and_where_the_others_are(model: Path) -> None:
    found = arguments(plan(model, max_waiting=7, policy="random", log_level="debug"))
    kvstore = f"127.0.0.1:{found['kvstore']['--kvstore-port']}"
    for name in ("router", "prefill-0", "decode-0"):
        assert found[name]["--kvstore"] == kvstore
        assert found[name]["--model"] == str(model)
        assert found[name]["--log-level"] == "debug"
    assert found["router"]["--policy"] == "random"
    assert found["decode-0"]["--max-waiting"] == "7"
    assert "--max-waiting" not in found["router"]
    assert (found["decode-0"]["--role"], found["decode-0"]["--worker-id"]) == ("decode", "decode-0")
    assert int(found["router"]["--port"]) > 0


def test_a_url_that_may_hold_a_password_is_not_on_the_command_line(model: Path) -> None:
    (kvstore, *others) = plan(model, redis="redis://user:secret@127.0.0.1").processes
    assert kvstore.environ == {"BATON_REDIS": "redis://user:secret@127.0.0.1"}
    assert not any("secret" in word for spec in (kvstore, *others) for word in spec.arguments)


def test_only_the_public_ports_follow_the_routers_address(model: Path) -> None:
    found = arguments(plan(model, host="0.0.0.0"))
    assert {each.get("--host") for each in found.values()} == {"0.0.0.0", None}
    assert {each["--metrics-host"] for each in found.values()} == {"127.0.0.1"}
    assert not any("--worker-host" in each or "--kvstore-host" in each for each in found.values())
    asked = arguments(plan(model, metrics_host="0.0.0.0"))
    assert {each["--metrics-host"] for each in asked.values()} == {"0.0.0.0"}
    settings = resolve({}, {})[0]
    assert settings.worker.worker_host == settings.kvstore.kvstore_host == "127.0.0.1"


def test_files_of_certificates_reach_whom_they_concern(model: Path) -> None:
    internal = {"internal_tls_cert": "a", "internal_tls_key": "b", "internal_tls_ca": "c"}
    planned = plan(model, tls_cert="p", tls_key="q", api_keys="k", require_internal_tls=True, **internal)
    assert planned.base_url.startswith("https://")
    assert all("--require-internal-tls" in spec.arguments for spec in planned.processes)
    for name, each in arguments(planned).items():
        assert each["--internal-tls-cert"] == "a"
        assert ("--tls-cert" in each) == ("--api-keys" in each) == (name == "router")


def test_cores_are_divided_between_the_workers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "usable_cores", lambda: 8)
    threads = {n: arguments(plan(model, hybrid=n))["hybrid-0"]["--threads"] for n in (1, 3, 8, 9)}
    assert threads == {1: "8", 3: "2", 8: "1", 9: "1"}
    assert arguments(plan(model, hybrid=4, threads=5))["hybrid-0"]["--threads"] == "5"


def test_workers_get_cores_of_their_own_where_there_are_enough(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "own_cores", lambda: (1, 2, 3, 5, 7))

    def cores(**changes: object) -> list[str | None]:
        found = arguments(plan(model, **changes))
        return [each.get("--cores") for name, each in found.items() if name.startswith("hybrid")]

    assert cores(hybrid=2) == ["1,2", "3,5"]
    assert cores(hybrid=5) == ["1", "2", "3", "5", "7"]
    assert cores(hybrid=6) == [None] * 6
    assert cores(hybrid=1, threads=2) == ["1,2"]
    assert cores(hybrid=2, threads=3) == [None] * 2
    assert cores(hybrid=1, device="cuda") == [None]
    monkeypatch.setattr(cluster, "own_cores", lambda: ())
    assert cores(hybrid=2) == [None] * 2


def test_many_workers_share_half_of_the_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "available_bytes", lambda: 1_000_000)
    assert "--kv-bytes" not in arguments(plan(model, hybrid=4))["hybrid-0"]
    assert arguments(plan(model, hybrid=10))["hybrid-0"]["--kv-bytes"] == "50000"
    assert "--kv-bytes" not in arguments(plan(model, hybrid=10, kv_blocks=5))["hybrid-0"]


def test_workers_take_gpus_in_turn_and_share_their_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "gpu_count", lambda: 2)
    found = arguments(plan(model, device="cuda", hybrid=3))
    assert [found[f"hybrid-{n}"]["--gpu"] for n in range(3)] == ["0", "1", "0"]
    whole = resolve({}, {})[0].engine.gpu_memory_utilization
    assert float(found["hybrid-0"]["--gpu-memory-utilization"]) == whole / 2
    assert "--gpu" not in arguments(plan(model))["decode-0"]


def test_workers_on_several_gpus_take_neighbours_in_turn(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "gpu_count", lambda: 5)
    found = arguments(plan(model, device="cuda", hybrid=5, tensor_parallel=2))
    assert [found[f"hybrid-{n}"]["--gpu"] for n in range(5)] == ["0", "2", "0", "2", "0"]
    whole = resolve({}, {})[0].engine.gpu_memory_utilization
    assert float(found["hybrid-0"]["--gpu-memory-utilization"]) == whole / 3


def test_a_taken_port_is_refused(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=f"port {port} .*--grpc-port"):
            plan(model, grpc_port=port)


@pytest.mark.parametrize("name", ["", "/nowhere", "./nowhere", "a/b/c"])
def test_a_model_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="model"):
        plan(name)


def test_memory_is_counted_in_the_dtype_that_weights_will_have(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.cli.preflight.available_bytes", lambda: 3000)
    check_memory(model, "bfloat16", workers=3, kv_bytes=0)
    check_memory(model, "auto", workers=1, kv_bytes=1000)
    with pytest.raises(CannotStart, match="too little memory: 2 workers"):
        check_memory(model, "auto", workers=2, kv_bytes=0)
    with pytest.raises(CannotStart, match="too little memory"):
        check_memory(model, "bfloat16", workers=1, kv_bytes=2001)


def test_the_host_tier_counts_as_memory(model: Path) -> None:
    with pytest.raises(CannotStart, match=r"too little memory: 2 workers .*--kv-host-bytes"):
        plan(model, hybrid=2, kv_host_bytes=10**15)
