"""How loaded are the two roles, and how loaded would they be if some workers changed theirs?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

from baton.planning.demand import Need
from baton.routing import Role, WorkerView

# What a worker without curves can do of anything: more than is ever asked.
_UNMEASURED = 1e9


@dataclass(frozen=True)
class Capacity:
    """What one worker, or several, could do: prompts per second if they prefill; if they decode, requests at
    once within the target, and prompts per second in the time that the target leaves between short steps."""

    prompts_per_s: float
    decoding: float
    beside_per_s: float

    def __add__(self, other: Capacity) -> Capacity:
        return Capacity(
            self.prompts_per_s + other.prompts_per_s,
            self.decoding + other.decoding,
            self.beside_per_s + other.beside_per_s,
        )

    def __mul__(self, count: float) -> Capacity:
        return Capacity(self.prompts_per_s * count, self.decoding * count, self.beside_per_s * count)


NOTHING = Capacity(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Load:
    """The share of each role's capacity that is needed; above 1 requests pile up."""

    prefill: float
    decode: float

    @property
    def worst(self) -> float:
        return max(self.prefill, self.decode)

    @property
    def busier(self) -> Role:
        """The role with the higher load."""
        return Role.PREFILL if self.prefill > self.decode else Role.DECODE

    def __str__(self) -> str:
        return f"prefill {self.prefill:.0%}, decode {self.decode:.0%}"


def capacity_of(worker: WorkerView, need: Need, tpot_s: float, block_tokens: int) -> Capacity:
    """What a worker can do of `need`: by the curves that it measured, its KV pool, and, where tokens come
    slower than `tpot_s` lately, that much less."""
    seconds = worker.prefill_curve.seconds(max(1.0, need.prompt_tokens))
    batch = max((size for size, step_s in worker.decode_curve.points if step_s <= tpot_s), default=1.0)
    if not worker.decode_curve.points:
        batch = _UNMEASURED
    if need.tpot_s > tpot_s:
        batch *= tpot_s / need.tpot_s
    blocks = max(1.0, need.request_tokens / block_tokens)
    prompts_per_s = 1 / seconds if seconds else _UNMEASURED
    return Capacity(
        prompts_per_s,
        max(1.0, min(batch, worker.total_blocks / blocks)),
        prompts_per_s * max(0.0, 1 - worker.decode_curve.seconds(1) / tpot_s),
    )


@dataclass(frozen=True)
class Roles:
    """What the workers of each role can do together."""

    prefill: Capacity
    decode: Capacity

    @classmethod
    def of(cls, workers: Iterable[WorkerView], capacities: Mapping[str, Capacity]) -> Roles:
        roles = cls(NOTHING, NOTHING)
        for worker in workers:
            roles = roles.plus(worker.role, capacities[worker.worker_id])
        return roles

    def plus(self, role: Role, capacity: Capacity) -> Roles:
        """With `capacity` more in a role; less, where it is negative."""
        if role is Role.PREFILL:
            return Roles(self.prefill + capacity, self.decode)
        return Roles(self.prefill, self.decode + capacity)

    def flipped(self, to: Role, capacity: Capacity) -> Roles:
        """With a worker of that capacity in role `to`, out of the other one."""
        away = Role.DECODE if to is Role.PREFILL else Role.PREFILL
        return self.plus(away, capacity * -1).plus(to, capacity)

    def load(self, need: Need) -> Load:
        """Prompts are computed by prefill workers and, in the time that is left to them, by those that
        decode."""
        decode = _share(need.decoding, self.decode.decoding)
        beside_per_s = max(0.0, 1 - decode) * self.decode.beside_per_s
        return Load(_share(need.prompts_per_s, self.prefill.prompts_per_s + beside_per_s), decode)


def _share(needed: float, there: float) -> float:
    if needed <= 0:
        return 0.0
    return needed / there if there > 0 else inf
