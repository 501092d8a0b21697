"""A plan as values of the Helm chart."""

from __future__ import annotations

from math import gcd
from string import Template

from baton.planning.fleet import Offer
from baton.planning.search import Candidate, Goal

_VALUES = Template(
    """\
# Written by
#
#     $command
#
# Ratio $ratio: $fleet, $gpus GPUs.
# Requests that meet $targets: $predicted predicted, $simulated in the simulator.
device: cuda
prefill:
$prefill
decode:
$decode
"""
)
_ROLE = Template(
    """\
  replicas: $replicas
  config:
    maxBatchTokens: $tokens
    maxBatchRequests: $requests
    tensorParallel: $gpus
  resources:
    limits: {nvidia.com/gpu: $gpus}"""
)


def ratio(prefills: int, decoders: int) -> str:
    """Prefill workers to decode workers, in lowest terms."""
    common = gcd(prefills, decoders) or 1
    return f"{prefills // common} : {decoders // common}"


def helm_values(plan: Candidate, goal: Goal, command: str) -> str:
    """A values file that installs the plan, to be given after a preset; says what it was computed by."""
    fleet, targets = plan.fleet, goal.targets
    asked = [
        f"{seconds:g} s {what}"
        for seconds, what in (
            (targets.ttft_s, "to the first token"),
            (targets.tpot_s, "per token after it"),
        )
        if seconds is not None
    ]
    return _VALUES.substitute(
        command=command,
        ratio=ratio(fleet.prefills, fleet.decoders),
        fleet=fleet,
        gpus=fleet.gpus,
        targets=" and ".join(asked),
        predicted=f"{plan.predicted.attainment:.1%}",
        simulated=f"{plan.attainment:.1%}",
        prefill=_role(fleet.prefill, fleet.prefills),
        decode=_role(fleet.decode, fleet.decoders),
    )


def _role(offer: Offer, replicas: int) -> str:
    return _ROLE.substitute(
        replicas=replicas,
        tokens=offer.spec.max_batch_tokens,
        requests=offer.spec.max_batch_requests,
        gpus=offer.gpus,
    )
