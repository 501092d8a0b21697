"""How many replicas of a role Serve should run, by what its workers report: a policy of its autoscaler."""

from __future__ import annotations

from math import ceil
from typing import Any

from ray.serve.config import AutoscalingContext

#: Prompt tokens that may wait at a prefill worker, and the share of its KV that a decode worker may use.
QUEUED_TOKENS = 8192.0
KV_USAGE = 0.7


def by_queue(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas among which the waiting prompt tokens, or the KV in use, would be as much as may be.

    Serve keeps the answer between the deployment's least and most replicas, and delays going up and down.
    """
    name, each = (
        ("queued_tokens", QUEUED_TOKENS) if context.deployment_name == "prefill" else ("kv_usage", KV_USAGE)
    )
    reported = (context.aggregated_metrics or {}).get(name, {})
    if not reported:
        return context.target_num_replicas, {}
    return max(1, ceil(sum(reported.values()) / each)), {}
