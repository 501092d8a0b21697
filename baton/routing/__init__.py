"""Where a request runs: cluster views, the cost model and the placement policies.

Pure functions of values, so that the simulator runs the very files that the router runs.
"""

from __future__ import annotations

from random import Random
from typing import get_args

from baton.config import BadSetting, PolicyName
from baton.routing.least_loaded import LeastLoaded
from baton.routing.placement import Candidate, Placement, PullSource, Terms
from baton.routing.policy import Policy
from baton.routing.prefix import Prefix
from baton.routing.random import RandomPolicy
from baton.routing.round_robin import RoundRobin
from baton.routing.session import Session
from baton.routing.view import (
    ClusterView,
    Curve,
    Request,
    Role,
    Slo,
    Unplaceable,
    WorkerView,
)

__all__ = [
    "Candidate",
    "ClusterView",
    "Curve",
    "Placement",
    "Policy",
    "PullSource",
    "Request",
    "Role",
    "Slo",
    "Terms",
    "Unplaceable",
    "WorkerView",
    "create_policy",
]


def create_policy(name: str, rng: Random) -> Policy:
    """The placement policy called `name`; `rng` breaks its ties.

    Raises:
        BadSetting: there is no such policy.
    """
    match name:
        case "prefix":
            return Prefix(rng)
        case "least-loaded":
            return LeastLoaded(rng)
        case "round-robin":
            return RoundRobin()
        case "random":
            return RandomPolicy(rng)
        case "session":
            return Session(rng)
    raise BadSetting(f"no policy {name!r}; there are {', '.join(get_args(PolicyName))}", field="policy")
