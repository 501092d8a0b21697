"""Which fleet meets the targets with the fewest GPUs?

Two stages. The fluid model (`baton.planning.fluid`) says in milliseconds which fleets could; the simulator,
which runs the real policies, says which do. Every fleet with fewer GPUs than the chosen one that comes near
the target in the fluid model has been simulated and has missed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from baton.bench.summary import Targets
from baton.errors import BatonError
from baton.planning.fleet import Fleet, Offer
from baton.planning.fluid import Prediction, attained, serve
from baton.sim.cluster import SimCluster
from baton.sim.simulator import SimReport, simulate
from baton.sim.workload import SimRequest

# How far below the target the fluid model may put a fleet that is still simulated. Attainment is a share.
# What the model leaves out makes fleets look better in it than they are; it was never seen 2 points too low.
_DOUBT = 0.05


class NoPlan(BatonError):
    """No fleet within the budget meets the targets; the message says what came nearest."""


@dataclass(frozen=True)
class Goal:
    """What a fleet must do: `attainment` is the share of requests that must meet both targets."""

    targets: Targets
    attainment: float = 0.9
    max_gpus: int = 64


@dataclass(frozen=True)
class Candidate:
    """A fleet, what the fluid model predicts of it, and, once simulated, what the simulator found."""

    fleet: Fleet
    predicted: Prediction
    simulated: SimReport | None = None

    @property
    def attainment(self) -> float:
        """In the simulator; 0 when it was not simulated."""
        return 0.0 if self.simulated is None else self.simulated.summary.attainment or 0.0


@dataclass(frozen=True)
class Plan:
    """The chosen fleet first, then every other one that was simulated, fewest GPUs first."""

    chosen: Candidate
    rejected: tuple[Candidate, ...]


Progress = Callable[[Candidate], None]


def find_plan(
    offers: Sequence[Offer],
    requests: Sequence[SimRequest],
    like: SimCluster,
    goal: Goal,
    progress: Progress = lambda candidate: None,
) -> Plan:
    """The fleet of separate roles with the fewest GPUs that meets `goal`, the best one of those.

    Args:
        offers: kinds of workers that either role may have.
        requests: the workload, by arrival.
        like: what the fleet's cluster is otherwise: policy, routers, sizes.
        progress: is told of every fleet that was simulated.

    Raises:
        NoPlan: nothing within `goal.max_gpus` does.
    """
    rejected: list[Candidate] = []
    for gpus in range(1, goal.max_gpus + 1):
        likely = [
            Candidate(fleet, predicted)
            for fleet in _fleets(offers, gpus)
            if (predicted := _predicted(fleet, requests, like, goal.targets)).attainment
            >= goal.attainment - _DOUBT
        ]
        met: list[Candidate] = []
        for candidate in sorted(likely, key=lambda one: -one.predicted.attainment):
            tried = _simulated(candidate, requests, like, goal.targets)
            progress(tried)
            (met if tried.attainment >= goal.attainment else rejected).append(tried)
        if met:
            chosen = max(met, key=lambda one: one.attainment)
            return Plan(chosen, (*rejected, *(other for other in met if other is not chosen)))
    nearest = max(rejected, key=lambda one: one.attainment, default=None)
    came = "the fluid model puts none near it" if nearest is None else f"{nearest.fleet} comes nearest with "
    share = "" if nearest is None else f"{nearest.attainment:.0%}"
    raise NoPlan(
        f"no fleet of up to {goal.max_gpus} GPUs serves {goal.attainment:.0%} of the requests in time: "
        f"{came}{share}; relax the targets, lower the rate, or allow more GPUs"
    )


def _fleets(offers: Sequence[Offer], gpus: int) -> Iterator[Fleet]:
    """Every fleet of both roles with exactly so many GPUs."""
    for prefill_offer in offers:
        for decode_offer in offers:
            for prefills in range(1, gpus // prefill_offer.gpus + 1):
                left = gpus - prefills * prefill_offer.gpus
                if left > 0 and left % decode_offer.gpus == 0:
                    yield Fleet(prefill_offer, prefills, decode_offer, left // decode_offer.gpus)


def _predicted(
    fleet: Fleet, requests: Sequence[SimRequest], like: SimCluster, targets: Targets
) -> Prediction:
    return attained(*serve(fleet, requests, like), targets)


def _simulated(
    candidate: Candidate, requests: Sequence[SimRequest], like: SimCluster, targets: Targets
) -> Candidate:
    report = simulate(candidate.fleet.cluster(like), iter(requests), targets)
    return Candidate(candidate.fleet, candidate.predicted, report)
