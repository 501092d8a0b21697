"""What a router says of the cluster at /ui/state and /ui/timeline, to the page and to `baton top`."""

from __future__ import annotations

import msgspec


class WorkerNow(msgspec.Struct, frozen=True):
    """One live worker. `usable` is whether requests can be sent to it now, `avoided` whether they keep away
    from it because it failed lately."""

    id: str
    incarnation: str
    role: str
    address: str
    usable: bool
    draining: bool
    avoided: bool
    running: int
    waiting: int
    queued_tokens: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    block_bytes: int


class FlowNow(msgspec.Struct, frozen=True):
    """KV that `target` has read from `source` for this router's requests since its start."""

    source: str
    target: str
    bytes: int


class Requests(msgspec.Struct, frozen=True):
    """This router's traffic: what runs and waits now, and tokens since its start."""

    running: int
    waiting: int
    prompt_tokens: int
    output_tokens: int


class Percentiles(msgspec.Struct, frozen=True):
    p50: float
    p90: float
    p99: float


class Latency(msgspec.Struct, frozen=True):
    """Seconds, of the last minute; None where there was nothing to measure."""

    ttft: Percentiles | None
    tpot: Percentiles | None
    e2e: Percentiles | None


class Goodput(msgspec.Struct, frozen=True):
    """Of the last minute: choices that ended, and those among them that met the targets."""

    ended: int
    good: int


class Phase(msgspec.Struct, frozen=True):
    """What a choice spent time on, in seconds since its arrival."""

    name: str
    start_s: float
    end_s: float


class ChoiceNow(msgspec.Struct, frozen=True):
    """One choice and when what happened to it; `outcome` is empty while it runs."""

    request_id: str
    slo: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    outcome: str
    prefill: str
    decode_worker: str
    computing_worker: str
    pull_worker: str
    placements: int
    predicted_s: float
    ttft_s: float | None
    tpot_s: float | None
    phases: list[Phase]


class ClusterNow(msgspec.Struct, frozen=True):
    """The cluster as one router sees it. `chat` is whether the model has a chat template; `targets` are the
    seconds to the first token and per further one that count as good."""

    version: str
    model: str
    chat: bool
    policy: str
    time_s: float
    kvstore_connected: bool
    index_blocks: int
    workers: list[WorkerNow]
    flows: list[FlowNow]
    requests: Requests
    latency: Latency
    goodput: dict[str, Goodput]
    targets: tuple[float, float]
    recent: list[ChoiceNow]


class Choices(msgspec.Struct, frozen=True):
    """The choices of one request, in order."""

    choices: list[ChoiceNow]
