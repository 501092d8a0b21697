"""Every setting of every process: name, type, default, meaning, and where its value came from.

One name everywhere: the field `grpc_port` is the flag `--grpc-port`, the environment variable
`BATON_GRPC_PORT` and the Helm value `grpcPort`. Flags beat the environment, which beats defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec

from baton.errors import BatonError

Device = Literal["cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
RoleName = Literal["prefill", "decode", "hybrid"]
AttentionName = Literal["auto", "flashinfer", "flash", "native", "tiled"]
ToolCallFormatName = Literal["auto", "hermes", "llama3_json", "mistral", "none"]
PolicyName = Literal["prefix", "least-loaded", "round-robin", "random", "session"]


class BadSetting(BatonError):
    """A flag or variable has a value its setting cannot take; the message names it."""


def setting(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A dataclass field that is a setting; `help` is what `--help` prints, units included."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


def _bundled_model() -> str:
    """The small model beside the source tree; empty where baton is installed without it."""
    folder = Path(__file__).resolve().parent.parent / "models" / "baton-small"
    return str(folder) if folder.is_dir() else ""


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it is held in memory."""

    model: str = setting(_bundled_model(), "model folder in Hugging Face layout, or a Hugging Face id")
    served_model_name: str = setting("", "name clients use for the model [the last part of --model]")
    device: Device = setting("cpu", "where tensors live: cpu or cuda")
    gpu: int = setting(
        0, "which GPU a worker on cuda uses, by index; the first of --tensor-parallel", minimum=0
    )
    dtype: Dtype = setting("auto", "of weights and KV; auto is float32 on cpu, the checkpoint's on cuda")
    max_model_len: int = setting(
        0, "tokens of prompt and output together [0: what the model allows]", minimum=0
    )


@dataclass(frozen=True)
class EngineSettings:
    """How a worker batches, how much KV it keeps, and on how many devices."""

    tensor_parallel: int = setting(
        1, "devices that a worker spreads the model and its KV over, all of one machine", minimum=1
    )
    block_size: int = setting(
        0, "tokens per KV block, a power of two [0: what the backend prefers, 16 on cpu]", minimum=0
    )
    attention: AttentionName = setting(
        "auto", "attention backend; auto is the fastest of them that is installed and can serve the model"
    )
    kv_blocks: int = setting(0, "KV blocks in the pool [0: from --kv-bytes]", minimum=0)
    kv_bytes: int = setting(
        0,
        "bytes of KV pool on each device of a worker [0: on cpu 1 GiB or what one longest context takes, if "
        "an eighth of the free memory is that much; on cuda what --gpu-memory-utilization leaves]",
        minimum=0,
    )
    kv_host_bytes: int = setting(
        0, "bytes of host memory for KV blocks that the pool has no room for [0: none]", minimum=0
    )
    kv_disk_path: str = setting("", "folder for KV blocks that host memory has no room for [empty: none]")
    kv_disk_bytes: int = setting(0, "bytes of the file in --kv-disk-path", minimum=0)
    gpu_memory_utilization: float = setting(
        0.9, "share of a GPU's memory that weights and KV of one worker take", minimum=0.01, maximum=1
    )
    max_batch_tokens: int = setting(
        0,
        "tokens computed per engine step at most [0: as few as reach full prefill speed, measured at start]",
        minimum=0,
    )
    itl_target_s: float = setting(
        0.0,
        "seconds a step in which requests decode should take at most: by the step times measured at start, "
        "fewer prompt tokens and fewer new requests join it [0: unbounded]",
        minimum=0,
    )
    max_batch_requests: int = setting(64, "requests decoded per engine step at most", minimum=1)
    max_waiting: int = setting(1024, "requests a worker queues before it refuses more", minimum=1)
    step_timeout_s: float = setting(
        120.0,
        "seconds an engine step may take before the worker counts as stuck and ends, to be started anew",
        minimum=0.1,
    )
    overlap: Literal["auto", "on", "off"] = setting(
        "auto",
        "begin an engine step while the device computes the one before; auto is on on cuda, off on cpu",
    )
    cuda_graphs: bool = setting(True, "on cuda, run decode steps as graphs recorded at start")
    threads: int = setting(
        0, "threads a worker computes with [0: as many as it has cores; baton up divides them]", minimum=0
    )
    cores: str = setting(
        "", "cores a worker is bound to, such as 0-3,8 [empty: any; baton up gives each worker its own]"
    )


@dataclass(frozen=True)
class WorkerSettings:
    """One prefill, decode or hybrid worker."""

    role: RoleName = setting("hybrid", "what new work the worker takes at start")
    worker_id: str = setting("", "stable name of the worker [role-host-port]")
    worker_host: str = setting("127.0.0.1", "address the worker listens on and is reached at")
    worker_port: int = setting(0, "gRPC port of the worker [0: any free one]", minimum=0, maximum=65535)
    transfer: Literal["nixl", "inprocess"] = setting(
        "nixl", "how KV moves; inprocess works within one process only, for platforms without NIXL"
    )
    drain_timeout_s: float = setting(
        30.0, "seconds in which requests may move away from a stopping worker, or end", minimum=0
    )
    handoff_timeout_s: float = setting(120.0, "seconds a handoff may wait for its next message", minimum=0.1)
    kv_verify: bool = setting(
        False, "compare digests of the KV blocks read from other workers with those of their source"
    )
    pull_timeout_s: float = setting(
        10.0,
        "seconds reading a cached prefix from a peer may take before it is computed instead",
        minimum=0.1,
    )


@dataclass(frozen=True)
class RouterSettings:
    """The public front."""

    host: str = setting("127.0.0.1", "address the router listens on")
    port: int = setting(8000, "HTTP port (OpenAI API, health)", minimum=0, maximum=65535)
    grpc_port: int = setting(
        50051, "gRPC port (baton.v1.Inference) [0: any free one]", minimum=0, maximum=65535
    )
    share_ports: bool = setting(
        False, "let other routers listen on the same two ports: the kernel spreads connections among them"
    )
    policy: PolicyName = setting("prefix", "how requests are placed")
    tool_call_parser: ToolCallFormatName = setting(
        "auto", "how the model writes calls of tools; auto is what its chat template asks it for"
    )
    max_body_bytes: int = setting(
        8 * 1024 * 1024, "largest request read, an HTTP body or a gRPC message", minimum=1024
    )
    head_timeout_s: float = setting(
        10.0, "seconds until a request's line and headers must have arrived", minimum=0.1
    )
    api_keys: str = setting(
        "", "file of the API keys that requests need, as `baton keys` writes it [empty: none needed]"
    )
    tls_cert: str = setting(
        "", "PEM file of the certificate that clients see, chain included [empty: no TLS]"
    )
    tls_key: str = setting("", "PEM file of its private key")
    max_running: int = setting(1024, "choices in flight; more requests wait", minimum=1)
    batch_share: float = setting(
        0.5, "share of --max-running that batch requests may take", minimum=0, maximum=1
    )
    prefill_ahead_s: float = setting(
        1.0,
        "seconds of predicted prefill queued at every worker from which on requests wait in the router",
        minimum=0,
    )
    max_queued: int = setting(
        1024, "requests of each class that wait in the router before it answers 429", minimum=0
    )
    queue_timeout_s: float = setting(30.0, "seconds an interactive request waits at most", minimum=0)
    batch_queue_timeout_s: float = setting(300.0, "seconds a batch request waits at most", minimum=0)
    trust_tenant_header: bool = setting(
        False, "take the tenant from x-tenant-id: only behind a proxy that sets it"
    )
    tenant_weights: str = setting("", "shares of waiting tenants, as NAME=WEIGHT,NAME=WEIGHT [1 each]")
    tenant_isolation: bool = setting(False, "never let a tenant reuse the KV of another's prompts")
    request_timeout_s: float = setting(600.0, "seconds a request may take in all", minimum=1)
    slo_ttft_s: float = setting(
        2.0, "seconds to the first token that an interactive answer may take to count as good", minimum=0
    )
    slo_tpot_s: float = setting(
        0.1, "mean seconds per further token that it may take to count as good", minimum=0
    )
    max_placements: int = setting(4, "placements tried for one request before it fails", minimum=1)
    stop_grace_s: float = setting(5.0, "seconds a stopping router lets running requests finish", minimum=0)


@dataclass(frozen=True)
class KvstoreSettings:
    """The prefix index and worker registry."""

    kvstore: str = setting("127.0.0.1:50052", "address of the kvstore (host:port)")
    kvstore_port: int = setting(
        50052, "gRPC port the kvstore listens on [0: any free one]", minimum=0, maximum=65535
    )
    kvstore_host: str = setting("127.0.0.1", "address the kvstore listens on")
    redis: str = setting(
        "",
        "Redis that outlives the kvstore: redis://, redis+sentinel:// or redis+cluster://, rediss... for TLS "
        "[empty: in the kvstore's memory]",
    )
    index_max_bytes: int = setting(
        1 << 30,
        "memory the prefix index may take in the kvstore and in each router; beyond it blocks are forgotten",
        minimum=1 << 20,
    )
    worker_ttl_s: float = setting(5.0, "seconds without a beat after which a worker is gone", minimum=0.5)


@dataclass(frozen=True)
class InternalTlsSettings:
    """How routers, workers and kvstore prove to each other who they are."""

    internal_tls_cert: str = setting(
        "", "PEM file of the certificate this process shows the others [empty: plain gRPC between them]"
    )
    internal_tls_key: str = setting("", "PEM file of its private key")
    internal_tls_ca: str = setting(
        "", "PEM file of the authority that signs these certificates, and nothing but these"
    )
    internal_tls_name: str = setting("baton", "DNS name that every such certificate holds")
    require_internal_tls: bool = setting(False, "do not start without the three files above")


@dataclass(frozen=True)
class PlannerSettings:
    """What keeps the number of workers and their roles right."""

    planner_host: str = setting("127.0.0.1", "address the planner's /metrics listens on")
    router_metrics: str = setting(
        "127.0.0.1:9090", "host:port of the routers' /metrics; every address that the name has is asked"
    )
    plan_interval_s: float = setting(5.0, "seconds between two looks at the cluster", minimum=0.1)
    dry_run: bool = setting(False, "only say what would be done")
    budget_gpus: int = setting(
        0,
        "devices that all workers together may take, a worker on cpu being one [0: none are added]",
        minimum=0,
    )
    tpot_target_s: float = setting(
        0.1, "seconds per token after the first, which say how many requests decode together", minimum=0.001
    )
    target_utilization: float = setting(
        0.7, "share of what a role's workers can do from which on it needs more", minimum=0.05, maximum=1
    )
    grow_after_s: float = setting(20.0, "seconds of too much to do before workers are added", minimum=0)
    shrink_after_s: float = setting(300.0, "seconds of little to do before a worker goes", minimum=0)
    least_prefill: int = setting(1, "prefill workers there always are", minimum=0)
    least_decode: int = setting(1, "decode workers there always are", minimum=1)
    gpus_per_prefill: int = setting(1, "devices of a new prefill worker", minimum=1)
    gpus_per_decode: int = setting(1, "devices of a new decode worker", minimum=1)
    prefill_workload: str = setting(
        "", "Kubernetes Deployment of the prefill workers [empty: roles change, numbers do not]"
    )
    decode_workload: str = setting("", "Kubernetes Deployment of the decode workers [empty: as above]")
    namespace: str = setting("default", "Kubernetes namespace they are in")
    lease: str = setting("", "Lease that the planner which acts holds [empty: there is one planner]")


@dataclass(frozen=True)
class ClientSettings:
    """How `baton chat` reaches a running cluster."""

    url: str = setting("http://127.0.0.1:8000", "HTTP address of a running cluster's router")


@dataclass(frozen=True)
class ClusterSettings:
    """What `baton up` starts."""

    prefill: int = setting(1, "prefill workers", minimum=0)
    decode: int = setting(1, "decode workers", minimum=0)
    hybrid: int = setting(
        0, "hybrid workers (given alone, replaces the default 1 prefill + 1 decode)", minimum=0
    )
    routers: int = setting(1, "routers, behind one HTTP port and one gRPC port", minimum=1)
    start_timeout_s: float = setting(120.0, "seconds until every process must be ready", minimum=1)
    stop_timeout_s: float = setting(
        10.0,
        "seconds the routers, then the workers, then the kvstore get to stop before they are killed",
        minimum=0,
    )
    keep_logs: bool = setting(False, "keep the log files after a clean stop")


@dataclass(frozen=True)
class ObservabilitySettings:
    """What the processes say about themselves."""

    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe log line written")
    log_format: Literal["auto", "text", "json"] = setting(
        "auto", "of log lines; auto is json where a program reads them through a pipe, else text"
    )
    otlp_endpoint: str = setting(
        "", "OTLP collector that traces go to by gRPC, such as http://127.0.0.1:4317 [empty: none]"
    )
    trace_share: float = setting(
        0.01,
        "share of requests traced, as that nearly doubles what one costs the router; one that comes with a "
        "traceparent is as that says",
        minimum=0,
        maximum=1,
    )
    metrics_port: int = setting(
        0,
        "HTTP port of /metrics, and of a router's /debug, which it never shares [0: any free one]",
        minimum=0,
        maximum=65535,
    )
    metrics_host: str = setting(
        "", "address that port listens on [the process's own; of baton up, 127.0.0.1]"
    )


@dataclass(frozen=True)
class Settings:
    """The whole tree. A process reads the sections it needs."""

    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    kvstore: KvstoreSettings = field(default_factory=KvstoreSettings)
    internal_tls: InternalTlsSettings = field(default_factory=InternalTlsSettings)
    planner: PlannerSettings = field(default_factory=PlannerSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    observability: ObservabilitySettings = field(default_factory=ObservabilitySettings)


PROCESS_SECTIONS: dict[str, tuple[str, ...]] = {
    "kvstore": ("kvstore", "internal_tls", "observability"),
    "router": ("model", "router", "kvstore", "internal_tls", "observability"),
    "planner": ("planner", "kvstore", "internal_tls", "observability"),
    "prefill": ("model", "engine", "worker", "kvstore", "internal_tls", "observability"),
    "decode": ("model", "engine", "worker", "kvstore", "internal_tls", "observability"),
}
"""Which sections each process takes flags for: `@settings_options(*PROCESS_SECTIONS["router"])`."""

SECTIONS: dict[str, type] = {f.name: f.default_factory for f in fields(Settings)}  # type: ignore[misc]


@dataclass(frozen=True)
class Effective:
    """A setting's value and where it came from: `flag --x`, `env BATON_X` or `default`."""

    section: str
    name: str
    value: object
    source: str


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    return "BATON_" + name.upper()


def declared(sections: Iterable[str] = SECTIONS) -> list[tuple[str, Field[Any], Any]]:
    """(section, field, resolved type) of every setting in `sections`, in order."""
    return [
        (section, item, get_type_hints(SECTIONS[section])[item.name])
        for section in sections
        for item in fields(SECTIONS[section])
    ]


def resolve(
    flags: Mapping[str, object] = {}, environ: Mapping[str, str] | None = None
) -> tuple[Settings, list[Effective]]:
    """Settle every setting. `flags` maps field names to values given on the command line (None: not given).

    Raises:
        BadSetting: a value has the wrong type or lies outside its range, or a BATON_ variable is unknown.
    """
    environ = os.environ if environ is None else environ
    known = {variable(item.name) for _, item, _ in declared()}
    for name in environ:
        if name.startswith("BATON_") and name not in known:
            raise BadSetting(f"unknown environment variable {name}; `baton config` lists the known ones")
    effective = []
    values: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
    for section, item, kind in declared():
        if flags.get(item.name) is not None:
            raw, source = flags[item.name], f"flag {flag(item.name)}"
        elif variable(item.name) in environ:
            raw, source = environ[variable(item.name)], f"env {variable(item.name)}"
        else:
            raw, source = item.default, "default"
        value = _convert(raw, kind, item, source)
        values[section][item.name] = value
        effective.append(Effective(section, item.name, value, source))
    return Settings(**{section: SECTIONS[section](**values[section]) for section in SECTIONS}), effective


def _convert(raw: object, kind: Any, item: Field[Any], source: str) -> object:
    try:
        value = msgspec.convert(raw, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadSetting(
            f"{source}: {raw!r} is not valid for {item.name}: {error}", field=item.name
        ) from error
    minimum, maximum = item.metadata["minimum"], item.metadata["maximum"]
    if minimum is not None and value < minimum:
        raise BadSetting(f"{source}: {item.name} must be at least {minimum}, got {value}", field=item.name)
    if maximum is not None and value > maximum:
        raise BadSetting(f"{source}: {item.name} must be at most {maximum}, got {value}", field=item.name)
    return value
