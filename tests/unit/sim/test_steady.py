"""Many steps at once end as the same steps one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.bench.trace import TraceRow
from baton.routing import Role
from baton.sim.cluster import Failure, SimCluster, WorkerSpec
from baton.sim.report import SimReport
from baton.sim.simulator import simulate
from baton.sim.speed import LinearSpeed
from baton.sim.workload import from_trace

SPEED = LinearSpeed((0.010, 1e-4, 1e-9), (0.010, 1e-7, 2e-4), (0.010, 1e-7, 2e-4), 1000)
WORKER = WorkerSpec(Role.HYBRID, SPEED, kv_blocks=4000, max_batch_tokens=128, max_batch_requests=4)
ROWS = st.lists(
    st.builds(TraceRow, st.floats(0, 2), st.integers(1, 400), st.integers(1, 90)), min_size=1, max_size=12
)
ROLES = st.sampled_from([(Role.HYBRID,), (Role.HYBRID,) * 2, (Role.PREFILL, Role.DECODE, Role.DECODE)])


def run(cluster: SimCluster, rows: Sequence[TraceRow], longest_leap: int) -> SimReport:
    ordered = sorted(rows, key=lambda row: row.arrival_s)
    with patch("baton.sim.worker._LONGEST_LEAP", longest_leap), patch("baton.sim.steady._LONGEST_LOG", 3):
        return simulate(cluster, from_trace(ordered, cluster.block_tokens))


@given(ROLES, ROWS, st.sampled_from([16, 64]), st.none() | st.floats(0.1, 2))
@settings(max_examples=80)
def test_leaps_end_as_steps_do(
    roles: tuple[Role, ...], rows: list[TraceRow], block_tokens: int, dies_at_s: float | None
) -> None:
    """A policy that looks at nothing, so that what workers report in the middle of a leap cannot matter."""
    last = f"{roles[-1].value}-{len(roles) - 1}"
    cluster = SimCluster(
        tuple(replace(WORKER, role=role) for role in roles),
        block_tokens,
        policy="round-robin",
        failures=() if dies_at_s is None or len(roles) == 1 else (Failure(dies_at_s, last),),
    )
    leaping, stepping = run(cluster, rows, 256), run(cluster, rows, 1)
    for one, other in zip(leaping.records, stepping.records, strict=True):
        assert one.output_tokens == other.output_tokens
        assert one.cached_tokens == other.cached_tokens
        assert (one.first_s, one.end_s) == pytest.approx((other.first_s, other.end_s), abs=1e-9)
        assert one.tbt_s == pytest.approx(other.tbt_s, rel=0.02)
    gaps = [sum(times for _, times in report.records.gaps.ordered()) for report in (leaping, stepping)]
    assert gaps[0] == gaps[1]
    for one, other in zip(leaping.workers, stepping.workers, strict=True):
        assert (one.steps, one.output_tokens) == (other.steps, other.output_tokens)
        assert one.busy_s == pytest.approx(other.busy_s)


def test_blocks_that_run_out_preempt_the_youngest_in_a_leap_too() -> None:
    small = replace(WORKER, kv_blocks=24)
    rows = [TraceRow(0.01 * number, 60, 90) for number in range(4)]
    for leap in (1, 256):
        report = run(SimCluster((small,), 16), rows, leap)
        assert report.summary.failed == 0
        assert sum(worker.preemptions for worker in report.workers) > 0
