"""What is simulated, and what may be changed while it runs: plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.bench.records import RequestRecord
from baton.config import PolicyName
from baton.engine.scheduler import Scheduler
from baton.routing import Role, WorkerView
from baton.routing.admission import Limits as AdmissionLimits
from baton.routing.nominees import EVERYBODY
from baton.sim.speed import Speed


@dataclass(frozen=True)
class WorkerSpec:
    """One worker: what it does, how fast its steps are, and the limits of its scheduler.

    `kv_blocks` are of the cluster's `block_tokens`; `network_bytes_per_s` is what its network card carries
    each way; `itl_target_s` is as the setting of that name; `gpus` is what it costs, in devices; `scheduler`
    chooses its steps.
    """

    role: Role
    speed: Speed
    kv_blocks: int
    max_batch_tokens: int = 2048
    max_batch_requests: int = 256
    max_waiting: int = 1024
    itl_target_s: float = 0.0
    network_bytes_per_s: float = 12.5e9
    gpus: int = 1
    scheduler: type[Scheduler] = Scheduler


@dataclass(frozen=True)
class Failure:
    """A worker that dies at `at_s`, with all it holds, and is back, empty, `back_after_s` later."""

    at_s: float
    worker_id: str
    back_after_s: float = 30.0


@dataclass(frozen=True)
class SimCluster:
    """The cluster at the start; workers are called `prefill-0`, `decode-1`, ...: role and place in
    `workers`.

    Attributes:
        block_tokens: tokens per KV block, a power of two.
        kv_bytes_per_token: what moving a token's KV takes.
        routers: each knows the others' promises `share_s` late. Requests go to them in turn.
        weighed: up to how many workers of a role a router weighs all of them, see `baton.routing.nominees`.
        placements: as the setting `max_placements`.
        network_s: what a message between two processes takes.
        router_s: what the router does before it places a request: parse, tokenize.
        detect_s: until a dead worker's requests are placed anew.
        admission: the router's door (`baton.routing.admission`); None lets everything in at once.
        prefill_ahead_s: as the setting of that name.
        beat_s: how often workers that only prefill report their load; the others do with every step.
    """

    workers: tuple[WorkerSpec, ...]
    block_tokens: int = 16
    kv_bytes_per_token: int = 131_072
    policy: PolicyName = "prefix"
    routers: int = 1
    weighed: int = EVERYBODY
    placements: int = 4
    network_s: float = 0.0005
    router_s: float = 0.001
    share_s: float = 0.010
    detect_s: float = 0.1
    beat_s: float = 0.1
    admission: AdmissionLimits | None = None
    prefill_ahead_s: float = 1.0
    failures: tuple[Failure, ...] = ()

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.kv_bytes_per_token

    @property
    def gpus(self) -> int:
        """Devices of all workers at the start."""
        return sum(worker.gpus for worker in self.workers)


@dataclass(frozen=True)
class SetRole:
    """Let a worker take other new work from now on; what it has it finishes."""

    worker_id: str
    role: Role


@dataclass(frozen=True)
class AddWorker:
    """Start a worker, which takes work `after_s` later."""

    worker_id: str
    spec: WorkerSpec
    after_s: float = 0.0


@dataclass(frozen=True)
class RemoveWorker:
    """Let a worker finish what it has and go."""

    worker_id: str


Action = SetRole | AddWorker | RemoveWorker


@dataclass(frozen=True)
class Observed:
    """What a controller sees: the cluster now, and what happened since it was last asked.

    `workers` are as a router sees them, draining ones included. `busy` is the share of that time for which
    each computed. `finished` holds failed requests too.
    """

    now_s: float
    interval_s: float
    workers: Sequence[WorkerView]
    busy: dict[str, float]
    arrived: int
    arrived_prompt_tokens: int
    finished: Sequence[RequestRecord]
    waiting_at_the_door: int


Controller = Callable[[Observed], Sequence[Action]]
"""Asked at intervals what to change. What it answers happens at once, in order."""


@dataclass
class WorkerTotals:
    """What one worker did, from `from_s` to `until_s`; `most_in_use` are blocks."""

    worker_id: str
    gpus: int
    from_s: float
    until_s: float = 0.0
    role: Role = Role.HYBRID
    busy_s: float = 0.0
    steps: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    sent_bytes: float = 0.0
    received_bytes: float = 0.0
    most_in_use: int = 0

    @property
    def utilization(self) -> float:
        """The share of its time for which it computed."""
        return self.busy_s / max(1e-12, self.until_s - self.from_s)
