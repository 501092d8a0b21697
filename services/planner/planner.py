"""Looks at the cluster, asks the controller, and does what it says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiohttp
import grpc
from kubernetes.aio.client import ApiException

from baton.config import PlannerSettings
from baton.planning.controller import Add, Aims, Controller, Decision, Flip, Remove, Sight
from baton.routing import Role
from baton.rpc.channels import open_channel
from baton.rpc.kvstore_messages import ROLE_NUMBERS
from baton.rpc.registry_watch import Peer, RegistryWatch
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from services.planner.demand import Routers
from services.planner.leader import Leadership
from services.planner.metrics import Metrics
from services.planner.workloads import Deployments, Workload

log = logging.getLogger(__name__)

_FLIP_TIMEOUT_S = 5.0
# A planner that is away for as long as it takes to start another, or that misses some rounds, is nothing yet.
_LEAST_LOAN_S, _LOAN_ROUNDS = 30.0, 6
_REFUSALS = (ApiException, aiohttp.ClientError, grpc.aio.AioRpcError, TimeoutError, OSError)


@dataclass(frozen=True)
class Reach:
    """Whom the planner hears and moves; `deployments` is None where nothing can be scaled."""

    registry: RegistryWatch
    routers: Routers
    deployments: Deployments | None
    leadership: Leadership


class Planner:
    """One planner process's rounds. `run` goes on until it is cancelled."""

    def __init__(self, settings: PlannerSettings, reach: Reach, metrics: Metrics) -> None:
        self._settings = settings
        self._reach = reach
        self._metrics = metrics
        self._aims = aims_of(settings)
        self._controller = Controller(self._aims)
        self._loan_s = max(_LEAST_LOAN_S, _LOAN_ROUNDS * settings.plan_interval_s)
        self._reported: frozenset[tuple[str, Role]] = frozenset()

    async def run(self) -> None:
        """A round every `--plan-interval-s`. A standby looks, too: it is to know the demand when it leads."""
        await self._reach.registry.ready()
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(self._settings.plan_interval_s)
            now_s = time.monotonic()
            await self._renew()
            try:
                await self._round(now_s, now_s - last_s)
            except _REFUSALS as error:
                log.warning("this round is left out: %s", _said(error))
                self._metrics.rounds.labels("failed").inc()
            last_s = now_s

    async def _renew(self) -> None:
        """Lend the roles that workers are lent for longer: those that this planner gave, or one before it."""
        if self._settings.dry_run or not self._reach.leadership.leading:
            return
        async with asyncio.TaskGroup() as tasks:
            for peer in list(self._reach.registry.peers.values()):
                worker = peer.worker
                if (
                    worker.own_role not in (worker_pb2.ROLE_UNSPECIFIED, worker.role)
                    and not peer.view.draining
                ):
                    tasks.create_task(self._renew_one(peer))

    async def _renew_one(self, peer: Peer) -> None:
        try:
            await self._lend(peer, peer.view.role)
        except _REFUSALS as error:
            log.warning("the role of %s is not lent for longer: %s", peer.view.worker_id, _said(error))

    async def _round(self, now_s: float, elapsed_s: float) -> None:
        reach = self._reach
        demanded = await reach.routers.look()
        self._metrics.routers.set(demanded.routers)
        self._metrics.leading.set(reach.leadership.leading)
        if not reach.registry.connected or not demanded.routers:
            # Without news of the workers or of what is asked of them, nothing is better than something.
            self._metrics.rounds.labels("blind").inc()
            return
        workloads = await reach.deployments.read() if reach.deployments is not None else {}
        workers = reach.registry.views()
        sight = Sight(
            now_s=now_s,
            elapsed_s=elapsed_s,
            workers=workers,
            arrived=demanded.arrived,
            ended=demanded.ended,
            waiting=demanded.waiting,
            prefills_beside=demanded.prefills_beside,
            starting=starting(workloads, [worker.worker_id for worker in workers]),
            gpus=devices(workloads, [worker.worker_id for worker in workers], self._aims.gpus),
            block_tokens=next((p.worker.layout.block_size for p in reach.registry.peers.values()), 0) or 16,
            staying=staying(workloads, [worker.worker_id for worker in workers], self._aims.least),
        )
        verdict = self._controller.decide(sight)
        live = Counter(Role.DECODE if worker.role.decodes else Role.PREFILL for worker in workers)
        self._metrics.show(verdict, live)
        self._metrics.gpus.set(sight.gpus)
        self._metrics.rounds.labels("decided").inc()
        if not reach.leadership.leading:
            return
        if self._settings.dry_run:
            await self._report(verdict.decisions, workloads)
            return
        for decision in verdict.decisions:
            await self._carry_out(decision, workloads)

    async def _report(self, decisions: Sequence[Decision], workloads: Mapping[Role, Workload]) -> None:
        """Say what would be done, once for as long as it stays the same."""
        said = frozenset((type(decision).__name__, decision.role) for decision in decisions)
        for decision in decisions:
            if (type(decision).__name__, decision.role) not in self._reported:
                await self._tell(decision, workloads, "dry")
        self._reported = said

    async def _carry_out(self, decision: Decision, workloads: Mapping[Role, Workload]) -> None:
        """Do one thing and say so. One that fails is decided again in a later round, if need be."""
        deployments = self._reach.deployments
        try:
            match decision:
                case Flip(worker_id, role):
                    peer = self._reach.registry.peers.get(worker_id)
                    if peer is None:
                        return
                    await self._lend(peer, role)
                case Add(role, count):
                    if deployments is None or role not in workloads:
                        return
                    await deployments.scale(workloads[role], workloads[role].replicas + count)
                case Remove(worker_id):
                    workload = owner(workloads, worker_id)
                    if deployments is None or workload is None or not workload.replicas:
                        return
                    await deployments.scale(workload, workload.replicas - 1)
        except _REFUSALS as error:
            log.error("%s: %s", _words(decision), _said(error))
            self._metrics.decisions.labels(*_labels(decision), "failed").inc()
            return
        await self._tell(decision, workloads, "done")

    async def _tell(self, decision: Decision, workloads: Mapping[Role, Workload], outcome: str) -> None:
        self._metrics.decisions.labels(*_labels(decision), outcome).inc()
        words = f"{_words(decision)}: {decision.reason}"
        if outcome == "dry":
            words = f"would {words[0].lower()}{words[1:]}"
        log.info("%s", words)
        if self._reach.deployments is None:
            return  # the log has it
        about = (
            workloads.get(decision.role)
            if isinstance(decision, Add)
            else owner(workloads, decision.worker_id)
        )
        try:
            await self._reach.deployments.tell(about, _KINDS[type(decision)], words)
        except _REFUSALS as error:
            log.warning("no Event for it: %s", _said(error))

    async def _lend(self, peer: Peer, role: Role) -> None:
        # Without a planner, those that come back to decoding are there before others leave it.
        for_s = self._loan_s + (_FLIP_TIMEOUT_S + self._settings.plan_interval_s if role.decodes else 0)
        async with open_channel(peer.view.address) as channel:
            await worker_pb2_grpc.WorkerAdminStub(channel).SetRole(
                worker_pb2.SetRoleRequest(role=ROLE_NUMBERS[role], for_s=for_s), timeout=_FLIP_TIMEOUT_S
            )


_KINDS: Mapping[type[Decision], str] = {Flip: "RoleFlipped", Add: "WorkersAdded", Remove: "WorkerRemoved"}


def aims_of(settings: PlannerSettings) -> Aims:
    """What the settings ask of the controller."""
    return Aims(
        budget=settings.budget_gpus or None,
        gpus={Role.PREFILL: settings.gpus_per_prefill, Role.DECODE: settings.gpus_per_decode},
        least={Role.PREFILL: settings.least_prefill, Role.DECODE: settings.least_decode},
        tpot_s=settings.tpot_target_s,
        utilization=settings.target_utilization,
        grow_after_s=settings.grow_after_s,
        shrink_after_s=settings.shrink_after_s,
    )


def owner(workloads: Mapping[Role, Workload], worker_id: str) -> Workload | None:
    """The workload that a worker is a pod of."""
    return next((workload for workload in workloads.values() if workload.has(worker_id)), None)


def starting(workloads: Mapping[Role, Workload], worker_ids: Sequence[str]) -> Mapping[Role, int]:
    """Workers that were asked for and are not there yet, by the role they will start in."""
    return {
        role: max(0, workload.replicas - sum(map(workload.has, worker_ids)))
        for role, workload in workloads.items()
    }


def staying(
    workloads: Mapping[Role, Workload], worker_ids: Sequence[str], least: Mapping[Role, int]
) -> frozenset[str]:
    """The workers of workloads that are as small as they may be. Without a planner roles that were lent end,
    and then there have to be workers whose own role each one is."""
    smallest = [workload for role, workload in workloads.items() if workload.replicas <= least[role]]
    return frozenset(one for one in worker_ids if any(workload.has(one) for workload in smallest))


def devices(workloads: Mapping[Role, Workload], worker_ids: Sequence[str], gpus: Mapping[Role, int]) -> int:
    """Devices of all workers: of those asked for, and of those that have yet to go. Workers of no workload
    count as one device each."""
    counted = sum(
        gpus[role] * max(workload.replicas, sum(map(workload.has, worker_ids)))
        for role, workload in workloads.items()
    )
    return counted + sum(owner(workloads, worker_id) is None for worker_id in worker_ids)


def _labels(decision: Decision) -> tuple[str, str]:
    return type(decision).__name__.lower(), decision.role.value


def _words(decision: Decision) -> str:
    match decision:
        case Flip(worker_id, role):
            return f"Flip {worker_id} to {role.value}"
        case Add(role, count):
            return f"Add {count} to {role.value}"
        case Remove(worker_id, role):
            return f"Remove one like {worker_id} from {role.value}"


def _said(error: BaseException) -> str:
    if isinstance(error, ApiException):
        return f"the API server answers {error.status} {error.reason}"
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
