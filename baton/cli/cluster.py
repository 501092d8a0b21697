"""Which processes make up the cluster of `baton up`, with which flags?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from baton.addresses import join
from baton.cli.preflight import CannotStart, check_memory, claim_port
from baton.cli.readiness import Readiness
from baton.cli.supervisor import Probe, ProcessSpec
from baton.config import PROCESS_SECTIONS, SECTIONS, Settings, flag, variable
from baton.machine import available_bytes, gpu_count, list_cores, own_cores, usable_cores
from baton.model_folder import model_folder

# The routers stop first, so that no new work reaches workers that stop.
_ROUTER, _WORKERS, _KVSTORE = range(3)

SERVICES = {
    "kvstore": "kvstore",
    "router": "router",
    "prefill": "prefill",
    "decode": "decode",
    "hybrid": "decode",
}
"""Which of `services/` runs a process of each role."""

# Settings that hold credentials: a command line is visible to every user of the machine.
_SECRET = {"redis"}


@dataclass(frozen=True)
class Cluster:
    """What to run, where its public front will be, and what the model in `folder` is called there."""

    processes: tuple[ProcessSpec, ...]
    readiness: Readiness
    base_url: str
    folder: Path
    model_name: str


def plan_cluster(settings: Settings, given: Collection[str]) -> Cluster:
    """Settle ports, model, threads and memory, and every process's command line.

    Args:
        given: names of the settings that do not have their default value.

    Raises:
        CannotStart, UnsupportedModel: one sentence about what stands in the way.
    """
    folder = model_folder(settings.model.model)
    roles = _worker_roles(settings, given)
    router, store = settings.router, settings.kvstore
    port = claim_port(router.host, router.port, "--port")
    grpc_port = claim_port(router.host, router.grpc_port, "--grpc-port")
    kvstore_port = claim_port(
        store.kvstore_host, store.kvstore_port if "kvstore_port" in given else 0, "--kvstore-port"
    )
    kvstore = _reachable(store.kvstore_host, kvstore_port)
    engine = _engine_flags(settings, len(roles))
    if settings.model.device == "cpu":
        kv_bytes = settings.engine.kv_bytes + settings.engine.kv_host_bytes
        check_memory(folder, settings.model.dtype, len(roles), kv_bytes)

    readiness = Readiness(kvstore)
    # Whoever reaches the public ports should not also reach what is for those who run the cluster.
    own_host = settings.observability.metrics_host or "127.0.0.1"
    passed_on = {**_passed_on(settings, given), "metrics_host": own_host}
    model = {"model": str(folder)}
    if folder != Path(settings.model.model).expanduser().resolve() and not settings.model.served_model_name:
        model["served_model_name"] = Path(settings.model.model).name
    scheme = "https" if router.tls_cert else "http"
    base_url = f"{scheme}://{_reachable(router.host, port)}"
    grpc_address = _reachable(router.host, grpc_port)

    def spec(name: str, role: str, stage: int, ready: Probe, own: Mapping[str, object]) -> ProcessSpec:
        service = SERVICES[role]
        accepted = {item.name for section in PROCESS_SECTIONS[service] for item in fields(SECTIONS[section])}
        wanted = {**passed_on, **model, **engine, "kvstore": kvstore, **own}
        values = {key: value for key, value in wanted.items() if key in accepted}
        return ProcessSpec(
            name=name,
            role=role,
            module=f"services.{service}",
            arguments=_arguments(values),
            stop_stage=stage,
            ready=ready,
            environ={variable(key): str(values[key]) for key in values.keys() & _SECRET},
        )

    several = settings.cluster.routers > 1
    routers = []
    for number in range(settings.cluster.routers):
        own_port = claim_port(own_host, 0, "--metrics-port")
        ready = partial(readiness.router, base_url, grpc_address, _reachable(own_host, own_port))
        own: dict[str, object] = {"port": port, "grpc_port": grpc_port, "metrics_port": own_port}
        if several:
            own["share_ports"] = True
        routers.append(spec(f"router-{number}" if several else "router", "router", _ROUTER, ready, own))
    workers = [
        spec(
            name,
            role,
            _WORKERS,
            partial(readiness.worker, name),
            {
                "role": role,
                "worker_id": name,
                **_gpu(settings, number),
                **_cores(settings, number, len(roles)),
            },
        )
        for number, (name, role) in enumerate(roles.items())
    ]
    return Cluster(
        processes=(
            spec("kvstore", "kvstore", _KVSTORE, readiness.kvstore, {"kvstore_port": kvstore_port}),
            *routers,
            *workers,
        ),
        readiness=readiness,
        base_url=base_url,
        folder=folder,
        model_name=settings.model.served_model_name or model.get("served_model_name", folder.name),
    )


def _worker_roles(settings: Settings, given: Collection[str]) -> dict[str, str]:
    """Worker id to role. `--hybrid K` alone asks for hybrid workers only."""
    wanted = settings.cluster
    counts = {"prefill": wanted.prefill, "decode": wanted.decode, "hybrid": wanted.hybrid}
    if wanted.hybrid and not {"prefill", "decode"} & set(given):
        counts["prefill"] = counts["decode"] = 0
    if not counts["decode"] and not counts["hybrid"]:
        raise CannotStart("nothing would decode: give --decode or --hybrid at least 1")
    return {f"{role}-{number}": role for role, count in counts.items() for number in range(count)}


def _engine_flags(settings: Settings, workers: int) -> dict[str, object]:
    """The cores divided between the workers, and the memory where the workers' own defaults would not
    fit together: on CPU an eighth of what is free, each; on GPUs, 90 % of the one they share."""
    flags: dict[str, object] = {}
    if not settings.engine.threads:
        flags["threads"] = max(1, usable_cores() // workers)
    chosen = settings.engine.kv_bytes or settings.engine.kv_blocks
    if workers > 4 and not chosen and settings.model.device == "cpu":
        flags["kv_bytes"] = available_bytes() // (2 * workers * settings.engine.tensor_parallel)
    if settings.model.device == "cuda" and not chosen:
        sharing = -(-workers // max(1, gpu_count() // settings.engine.tensor_parallel))
        flags["gpu_memory_utilization"] = settings.engine.gpu_memory_utilization / sharing
    return flags


def _cores(settings: Settings, number: int, workers: int) -> dict[str, object]:
    """Cores of its own for worker `number`, where there are enough for all: one that waits for a core
    keeps the other threads of its step waiting."""
    cores = own_cores()
    each = settings.engine.threads or len(cores) // workers
    if settings.model.device != "cpu" or not each or each * workers > len(cores):
        return {}
    return {"cores": list_cores(cores[number * each : (number + 1) * each])}


def _gpu(settings: Settings, number: int) -> dict[str, object]:
    """The first GPU of worker `number`: each in turn, or so many together, beginning with --gpu."""
    if settings.model.device != "cuda":
        return {}
    each = settings.engine.tensor_parallel
    return {"gpu": (settings.model.gpu + number * each) % max(1, gpu_count() // each * each)}


def _passed_on(settings: Settings, given: Collection[str]) -> dict[str, object]:
    """Every setting that does not have its default value, by name."""
    return {
        item.name: getattr(getattr(settings, section), item.name)
        for section in SECTIONS
        for item in fields(SECTIONS[section])
        if item.name in given
    }


def _arguments(values: Mapping[str, object]) -> tuple[str, ...]:
    words: list[str] = []
    for name, value in values.items():
        if name in _SECRET:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), str(value)]
    return tuple(words)


def _reachable(host: str, port: int) -> str:
    """The address at which this machine reaches a process that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return join(host, port)
