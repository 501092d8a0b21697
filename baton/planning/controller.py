"""Which workers change their role, and how many there are, as demand changes: `Controller.decide`.

Flips come first: they take less than a second, and weights and KV stay where they are. Only what flips cannot
mend makes workers come, and only a long lull makes them go. The cluster's planner and the simulator run this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from baton.planning.capacity import NOTHING, Capacity, Load, Roles, capacity_of
from baton.planning.demand import Arrived, Demand, Ended, Need
from baton.routing import Role, WorkerView

_OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}
_SHRINK_SHARE = 0.1


@dataclass(frozen=True)
class Aims:
    """What the controller is to reach, and how fast it may act.

    Attributes:
        budget: devices that all workers together may take, those that start or drain included; None is as
            many as they take now.
        gpus: devices that a new worker of each role takes.
        least: workers of each role that always stay.
        tpot_s: target of the seconds per token after the first.
        utilization: load of a role from which on it needs more workers.
        gain: share by which a change must lower the load of the busier role, so that two changes that undo
            each other take a change of demand that is larger than this.
        catch_up_s: how soon prompts that wait should be under way.
        flip_share: share of the workers that may change their role at once; with 0 none ever does.
        settle_s: after a flip, before one the other way.
        grow_after_s, shrink_after_s: how long there must be too few or too many workers.
    """

    budget: int | None
    gpus: Mapping[Role, int]
    least: Mapping[Role, int]
    tpot_s: float = 0.1
    utilization: float = 0.7
    gain: float = 0.15
    catch_up_s: float = 10.0
    flip_share: float = 0.5
    settle_s: float = 60.0
    grow_after_s: float = 20.0
    shrink_after_s: float = 300.0

    @property
    def ample(self) -> float:
        """Load that a role may come to when it gives workers away without need."""
        return (1 - self.gain) * self.utilization


@dataclass(frozen=True)
class Sight:
    """The cluster at `now_s`, and what happened in the `elapsed_s` before.

    Attributes:
        workers: live ones, draining ones included, as the registry knows them.
        arrived, ended: at all routers together.
        waiting: requests in routers that no worker has been given.
        starting: workers of each role that were asked for and are not live yet.
        gpus: devices that all workers take, those that start or drain included.
        block_tokens: tokens per KV block.
        staying: workers that may not be removed, whatever role they are in now.
        prefills_beside: whether routers have decode workers compute prompts, too.
    """

    now_s: float
    elapsed_s: float
    workers: Sequence[WorkerView]
    arrived: Arrived
    ended: Ended
    waiting: int
    starting: Mapping[Role, int]
    gpus: int
    block_tokens: int
    staying: frozenset[str] = frozenset()
    prefills_beside: bool = True


@dataclass(frozen=True)
class Flip:
    """Let a worker take the new work of `role` from now on."""

    worker_id: str
    role: Role
    reason: str


@dataclass(frozen=True)
class Add:
    """Start `count` more workers in `role`."""

    role: Role
    count: int
    reason: str


@dataclass(frozen=True)
class Remove:
    """Let a worker, which is in `role`, finish what it has and go."""

    worker_id: str
    role: Role
    reason: str


Decision = Flip | Add | Remove


@dataclass(frozen=True)
class Verdict:
    """What is needed, how loaded that makes the roles as they are, and what to do about it."""

    need: Need
    load: Load
    decisions: tuple[Decision, ...]


class Controller:
    """Decides, and remembers what was needed lately and when something was last changed."""

    def __init__(self, aims: Aims) -> None:
        self._aims = aims
        self._demand = Demand(aims.catch_up_s)
        self._flipped_s: dict[Role, float] = {}
        self._short_since_s: float | None = None
        self._ample_since_s: float | None = None

    def decide(self, sight: Sight) -> Verdict:
        """What to change now. Asked at intervals of some seconds; what it answers is done before it is asked
        again, or it says so again."""
        live = [worker for worker in sight.workers if not worker.draining]
        need = self._demand.see(sight.elapsed_s, sight.arrived, sight.ended, sight.waiting, live)
        state = _State(live, need, self._aims, sight)
        load = state.load()
        decisions: list[Decision] = [*self._flips(state, sight.now_s)]
        if live and not decisions:
            decisions += self._scaling(state, sight)
        return Verdict(need, load, tuple(decisions))

    def _flips(self, state: _State, now_s: float) -> list[Flip]:
        """Workers of the idler role that the busier one needs more, the idlest first. Where none is needed,
        prefill workers that will not be missed: those that decode can compute prompts, too."""
        flips: list[Flip] = []
        while len(flips) < state.most_flips:
            before = state.load()
            needed = before.worst > self._aims.utilization
            to = before.busier if needed else Role.DECODE
            if not state.spare(_OTHER[to]):
                break
            if now_s - self._flipped_s.get(_OTHER[to], -self._aims.settle_s) < self._aims.settle_s:
                break
            worker = state.idlest(_OTHER[to])
            after = state.flipped(worker, to)
            if needed and not (state.gains(before, after) and state.keeps_up(worker, to)):
                break
            if not needed and not state.unmissed(before, after):
                break
            flips.append(Flip(worker.worker_id, to, f"{before} of capacity; {after} after the flip"))
            state.flip(worker, to)
            self._flipped_s[to] = now_s
        return flips

    def _scaling(self, state: _State, sight: Sight) -> list[Decision]:
        now_s, aims = sight.now_s, self._aims
        budget = sight.gpus if aims.budget is None else aims.budget
        if sight.gpus > budget:
            return self._shed(
                state, sight.gpus - budget, f"{sight.gpus} devices are more than the budget of {budget}"
            )
        load = state.load(with_starting=True)
        self._short_since_s = _since(self._short_since_s, load.worst > aims.utilization, now_s)
        if self._short_since_s is not None:
            self._ample_since_s = None
            if now_s - self._short_since_s < aims.grow_after_s:
                return []
            return self._grow(state, load, budget - sight.gpus) or self._trade(state, load, sight)
        quiet = not any(sight.starting.values()) and len(state.workers) == len(sight.workers)
        shed = self._shed(state, 0, f"{load} of capacity is little") if quiet else []
        self._ample_since_s = _since(self._ample_since_s, bool(shed), now_s)
        if self._ample_since_s is None or now_s - self._ample_since_s < aims.shrink_after_s:
            return []
        self._ample_since_s = None
        return shed

    def _grow(self, state: _State, load: Load, free: int) -> list[Decision]:
        """As many more workers as bring the load down to the target, within `free` devices."""
        added: Counter[Role] = Counter()
        reached = load
        while reached.worst > self._aims.utilization:
            role = reached.busier
            free -= self._aims.gpus[role]
            if free < 0:
                break
            added[role] += 1
            state.add(role)
            lower = state.load(with_starting=True)
            if not lower.worst < reached.worst:
                break
            reached = lower
        reason = f"{load} of capacity for {self._aims.grow_after_s:.0f} s; {reached} once they are there"
        return [Add(role, count, reason) for role, count in added.items()]

    def _trade(self, state: _State, load: Load, sight: Sight) -> list[Decision]:
        """Where no worker may flip and no device is free: one of the idler role goes, to make room."""
        away = _OTHER[load.busier]
        moving = any(sight.starting.values()) or len(state.workers) < len(sight.workers)
        worker = state.removable(away)
        if self._aims.flip_share or moving or worker is None:
            return []
        if not state.gains(load, state.flipped(worker, load.busier)):
            return []
        return [Remove(worker.worker_id, away, f"{load} of capacity, and no device is free")]

    def _shed(self, state: _State, over: int, reason: str) -> list[Decision]:
        """Workers that can go without a role's load coming near the target; those of `over` devices must."""
        removed: list[Decision] = []
        for _ in range(max(1, over, int(_SHRINK_SHARE * len(state.workers)))):
            choices = [one for role in (Role.PREFILL, Role.DECODE) if (one := state.removable(role))]
            if not choices:
                break
            worker = min(choices, key=lambda one: state.without(one).worst)
            after = state.without(worker)
            if over <= 0 and after.worst > self._aims.ample:
                break
            over -= self._aims.gpus[state.role(worker)]
            role = state.remove(worker)
            removed.append(Remove(worker.worker_id, role, f"{reason}; {after} without it"))
        return removed


class _State:
    """The workers' roles while changes are tried out."""

    def __init__(self, workers: Sequence[WorkerView], need: Need, aims: Aims, sight: Sight) -> None:
        self.workers = workers
        self.most_flips = max(1, int(aims.flip_share * len(workers))) if aims.flip_share else 0
        self._need = need
        self._arriving = replace(need, prompts_per_s=need.arriving_per_s)
        self._aims = aims
        self._staying = sight.staying
        self._capacities = {
            worker.worker_id: capacity_of(worker, need, aims.tpot_s, sight.block_tokens) for worker in workers
        }
        if not sight.prefills_beside:
            self._capacities = {
                name: replace(capacity, beside_per_s=0.0) for name, capacity in self._capacities.items()
            }
        together = sum(self._capacities.values(), NOTHING)
        self._usual: Capacity = together * (1 / max(1, len(workers)))
        self._members: dict[Role, list[WorkerView]] = {
            Role.PREFILL: [worker for worker in workers if not worker.role.decodes],
            Role.DECODE: [worker for worker in workers if worker.role.decodes],
        }
        self._roles = Roles.of(workers, self._capacities)
        self._coming = Roles(
            self._usual * sight.starting.get(Role.PREFILL, 0),
            self._usual * sight.starting.get(Role.DECODE, 0),
        )

    def load(self, *, with_starting: bool = False) -> Load:
        roles = self._roles
        if with_starting:
            roles = roles.plus(Role.PREFILL, self._coming.prefill).plus(Role.DECODE, self._coming.decode)
        return roles.load(self._need)

    def gains(self, before: Load, after: Load) -> bool:
        """Whether a change lowers the load of the busier role enough to be worth it."""
        return after.worst < (1 - self._aims.gain) * before.worst

    def unmissed(self, before: Load, after: Load) -> bool:
        """Whether a prefill worker may decode from now on: prompts are computed about as soon as before.
        While nothing comes, nobody knows."""
        ample = after.worst <= self._aims.ample
        return ample and before.prefill > 0 and after.prefill < (1 + self._aims.gain) * before.prefill

    def keeps_up(self, worker: WorkerView, to: Role) -> bool:
        """Whether after a flip the roles can do what arrives, or clearly more of it than now: to catch up
        with what waits, a role gives no worker that it needs to keep up."""
        after = self._roles.flipped(to, self._capacities[worker.worker_id]).load(self._arriving)
        return after.worst <= 1 or self.gains(self._roles.load(self._arriving), after)

    def spare(self, role: Role) -> bool:
        """Whether a worker may leave the role."""
        return len(self._members[role]) > self._aims.least[role]

    def idlest(self, role: Role) -> WorkerView:
        return min(self._members[role], key=_business)

    def removable(self, role: Role) -> WorkerView | None:
        """The idlest worker that may go."""
        going = [one for one in self._members[role] if one.worker_id not in self._staying]
        return min(going, key=_business) if going and self.spare(role) else None

    def role(self, worker: WorkerView) -> Role:
        return Role.PREFILL if worker in self._members[Role.PREFILL] else Role.DECODE

    def flipped(self, worker: WorkerView, to: Role) -> Load:
        return self._roles.flipped(to, self._capacities[worker.worker_id]).load(self._need)

    def flip(self, worker: WorkerView, to: Role) -> None:
        self._members[_OTHER[to]].remove(worker)
        self._members[to].append(worker)
        self._roles = self._roles.flipped(to, self._capacities[worker.worker_id])

    def without(self, worker: WorkerView) -> Load:
        gone = self._capacities[worker.worker_id] * -1
        return self._roles.plus(self.role(worker), gone).load(self._need)

    def remove(self, worker: WorkerView) -> Role:
        role = self.role(worker)
        self._roles = self._roles.plus(role, self._capacities[worker.worker_id] * -1)
        self._members[role].remove(worker)
        return role

    def add(self, role: Role) -> None:
        """One more worker like the others will come."""
        self._coming = self._coming.plus(role, self._usual)


def _business(worker: WorkerView) -> tuple[int, int, str]:
    return worker.queued_tokens, worker.running + worker.waiting, worker.worker_id


def _since(since_s: float | None, holds: bool, now_s: float) -> float | None:
    """Since when a condition holds, which it now does or does not."""
    if not holds:
        return None
    return now_s if since_s is None else since_s
