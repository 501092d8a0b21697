"""What the planner says of itself, served as Prometheus text on /metrics."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from baton.planning.controller import Verdict
from baton.routing import Role

_ROLES = (Role.PREFILL, Role.DECODE)


class Metrics:
    """The planner's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.leading = Gauge(
            "baton_planner_leading", "1 while this planner is the one that acts.", registry=self.registry
        )
        self.rounds = Counter(
            "baton_planner_rounds", "Times it looked at the cluster, by what came of it.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.decisions = Counter(
            "baton_planner_decisions",
            "Decisions: flip, add or remove; the role; and done, failed or dry.",
            ["kind", "role", "outcome"],
            registry=self.registry,
        )
        self.routers = Gauge("baton_planner_routers", "Routers that answered.", registry=self.registry)
        self._load = Gauge(
            "baton_planner_load_ratio",
            "What is needed of a role over what its workers can do; from the target on it needs more.",
            ["role"],
            registry=self.registry,
        )
        self._workers = Gauge(
            "baton_planner_workers", "Workers that take new work, by role.", ["role"], registry=self.registry
        )
        self._prompts = Gauge(
            "baton_planner_prompts_per_second",
            "Prompts to compute to keep up and to catch up.",
            registry=self.registry,
        )
        self._decoding = Gauge(
            "baton_planner_decoding_requests", "Requests expected to decode at once.", registry=self.registry
        )
        self.gpus = Gauge(
            "baton_planner_gpus", "Devices of all workers, asked for ones included.", registry=self.registry
        )

    def show(self, verdict: Verdict, workers: Mapping[Role, int]) -> None:
        """Show what was found in a round."""
        loads = {Role.PREFILL: verdict.load.prefill, Role.DECODE: verdict.load.decode}
        for role in _ROLES:
            self._load.labels(role.value).set(loads[role])
            self._workers.labels(role.value).set(workers.get(role, 0))
        self._prompts.set(verdict.need.prompts_per_s)
        self._decoding.set(verdict.need.decoding)
