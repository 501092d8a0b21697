"""What came of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.bench.records import Records
from baton.bench.summary import Summary
from baton.routing import Role
from baton.sim.cluster import WorkerTotals


@dataclass(frozen=True)
class SimReport:
    """The requests, and what it took.

    `workers` has one entry per incarnation of a worker. Tokens are prompt tokens: all that were asked for,
    those of them found cached where they were computed, and those of these read from another worker.
    `gpu_s` are device-seconds that were there, `events` how many steps the simulator itself took.
    """

    summary: Summary
    records: Records
    workers: Sequence[WorkerTotals]
    prompt_tokens: int
    cached_tokens: int
    pulled_tokens: int
    placements: dict[str, int]
    span_s: float
    gpu_s: float
    events: int

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that nobody had to compute."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def goodput_per_gpu(self) -> float | None:
        """Requests per second and device that met the targets; None without targets."""
        goodput = self.summary.goodput_per_s
        return None if goodput is None else goodput / max(1e-12, self.gpu_s / max(1e-12, self.span_s))

    def imbalance(self, role: Role) -> float:
        """The busiest worker's computing seconds over the mean of its role's."""
        busy = [worker.busy_s for worker in self.workers if worker.role is role]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0
