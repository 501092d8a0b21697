"""Where a request should run: pure functions of a view of the cluster, shared with the simulator."""

from baton.routing.view import (
    ClusterView,
    Curve,
    Placement,
    Policy,
    Request,
    Role,
    Unplaceable,
    WorkerView,
)

__all__ = ["ClusterView", "Curve", "Placement", "Policy", "Request", "Role", "Unplaceable", "WorkerView"]
