"""The interface that every placement policy has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from baton.routing.candidates import all_candidates
from baton.routing.placement import Candidate, Placement
from baton.routing.view import ClusterView, Request


class Policy(ABC):
    """Chooses where a request runs. One file per policy; no sockets, clocks or tensors."""

    weighs: ClassVar[bool] = False
    """Whether it compares workers, and may be shown the likely ones alone (`baton.routing.nominees`)."""
    prefills_beside: ClassVar[bool] = False
    """Whether decode workers compute prompts although there are prefill workers."""

    @abstractmethod
    def choose(self, request: Request, cluster: ClusterView) -> Placement:
        """What `place` would answer, without counting it as placed.

        Raises:
            Unplaceable: see `ClusterView.decoders`.
        """

    def place(self, request: Request, cluster: ClusterView) -> Placement:
        """Choose the decode worker and, unless it should prefill itself, the prefill worker.

        Raises:
            Unplaceable: see `ClusterView.decoders`.
        """
        return self.choose(request, cluster)

    def explain(self, request: Request, cluster: ClusterView) -> list[Candidate]:
        """What `place` would choose, then every other pair of workers by its predicted total.

        Raises:
            Unplaceable: see `ClusterView.decoders`.
        """
        chosen = self.choose(request, cluster)
        others = [c for c in all_candidates(request, cluster) if c.placement.pair != chosen.pair]
        others.sort(key=lambda candidate: candidate.total_s)
        return [Candidate(chosen, chosen.terms.total_s(request.slo)), *others]
