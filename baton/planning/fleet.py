"""What can be planned with: the workers that may be had, and how many of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec


@dataclass(frozen=True)
class Offer:
    """A kind of worker, such as one model on two GPUs.

    `spec.role` does not matter here: the offer can take any role.
    """

    name: str
    spec: WorkerSpec

    @property
    def gpus(self) -> int:
        return self.spec.gpus

    def as_role(self, role: Role) -> WorkerSpec:
        return replace(self.spec, role=role)


@dataclass(frozen=True)
class Fleet:
    """So many workers that prefill and so many that decode."""

    prefill: Offer
    prefills: int
    decode: Offer
    decoders: int

    @property
    def gpus(self) -> int:
        return self.prefills * self.prefill.gpus + self.decoders * self.decode.gpus

    def cluster(self, like: SimCluster) -> SimCluster:
        """The fleet as a cluster that is otherwise `like` another."""
        prefill = (self.prefill.as_role(Role.PREFILL),) * self.prefills
        return replace(like, workers=prefill + (self.decode.as_role(Role.DECODE),) * self.decoders)

    def __str__(self) -> str:
        return f"{self.prefills} prefill {self.prefill.name} + {self.decoders} decode {self.decode.name}"
