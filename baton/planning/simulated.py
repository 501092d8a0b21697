"""The controller at the wheel of a simulated cluster, as `simulate(..., controller=...)` asks it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.planning.controller import Add, Controller, Flip, Remove, Sight, Verdict
from baton.planning.demand import Arrived, Ended
from baton.routing import Role
from baton.sim.cluster import Action, AddWorker, Observed, RemoveWorker, SetRole, SimCluster, WorkerSpec


@dataclass(frozen=True)
class Moment:
    """What the controller saw and said at `now_s`, and how many workers each role had."""

    now_s: float
    workers: Mapping[Role, int]
    verdict: Verdict


class SimulatedPlanner:
    """Carries out what `controller` decides; keeps a `history`.

    Args:
        cluster: as it is at the start.
        new: the worker that is started for each role.
        start_s: from the decision to start a worker until it takes work.
    """

    def __init__(
        self, controller: Controller, cluster: SimCluster, new: Mapping[Role, WorkerSpec], start_s: float
    ) -> None:
        self.history: list[Moment] = []
        self._controller = controller
        self._new = new
        self._start_s = start_s
        self._block_tokens = cluster.block_tokens
        self._gpus = {f"{spec.role.value}-{n}": spec.gpus for n, spec in enumerate(cluster.workers)}
        self._starting: dict[str, Role] = {}
        self._started = 0

    def __call__(self, seen: Observed) -> Sequence[Action]:
        live = {worker.worker_id for worker in seen.workers}
        self._starting = {name: role for name, role in self._starting.items() if name not in live}
        self._gpus = {
            name: gpus for name, gpus in self._gpus.items() if name in live or name in self._starting
        }
        answered = [record for record in seen.finished if not record.error]
        verdict = self._controller.decide(
            Sight(
                now_s=seen.now_s,
                elapsed_s=seen.interval_s,
                workers=seen.workers,
                arrived=Arrived(seen.arrived, seen.arrived_prompt_tokens),
                ended=Ended(
                    requests=len(answered),
                    prompt_tokens=sum(record.input_tokens for record in answered),
                    cached_tokens=sum(record.cached_tokens for record in answered),
                    output_tokens=sum(record.output_tokens for record in answered),
                    decode_s=sum(record.end_s - record.first_s for record in answered),
                ),
                waiting=seen.waiting_at_the_door,
                starting=Counter(self._starting.values()),
                gpus=sum(self._gpus.values()),
                block_tokens=self._block_tokens,
            )
        )
        counts = Counter(
            Role.DECODE if worker.role.decodes else Role.PREFILL
            for worker in seen.workers
            if not worker.draining
        )
        self.history.append(Moment(seen.now_s, counts, verdict))
        actions: list[Action] = []
        for decision in verdict.decisions:
            match decision:
                case Flip(worker_id, role):
                    actions.append(SetRole(worker_id, role))
                case Add(role, count):
                    actions += [self._start(role) for _ in range(count)]
                case Remove(worker_id):
                    actions.append(RemoveWorker(worker_id))
        return actions

    def _start(self, role: Role) -> AddWorker:
        self._started += 1
        name, spec = f"{role.value}-new-{self._started}", self._new[role]
        self._starting[name] = role
        self._gpus[name] = spec.gpus
        return AddWorker(name, spec, self._start_s)
