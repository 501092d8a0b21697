"""Is the plan the smallest fleet that serves the workload in time?"""

import random
from dataclasses import replace

import pytest

from baton.bench.summary import Targets
from baton.planning.fleet import Fleet, Offer
from baton.planning.search import Candidate, Goal, NoPlan, find_plan
from baton.routing import Role
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.profiles import speed_of
from baton.sim.simulator import simulate
from baton.sim.workload import BlockIds, SimRequest

OFFERS = [
    Offer(f"tp{gpus}", WorkerSpec(Role.HYBRID, speed_of(f"distserve:opt-13b:{gpus}"), 4000 * gpus, gpus=gpus))
    for gpus in (1, 2)
]
LIKE = SimCluster((), kv_bytes_per_token=819_200)
GOAL = Goal(Targets(ttft_s=0.4, tpot_s=0.1), max_gpus=8)


def workload(rate: float, count: int = 80) -> list[SimRequest]:
    draw, at_s, requests = random.Random(3), 0.0, []
    for number in range(count):
        at_s += draw.expovariate(rate)
        prompt = draw.randrange(100, 1500)
        requests.append(
            SimRequest(at_s, prompt, draw.randrange(20, 200), BlockIds((), 16, 16, prompt // 16, number))
        )
    return requests


def test_no_fleet_with_fewer_gpus_would_do() -> None:
    requests = workload(rate=10.0)
    plan = find_plan(OFFERS, requests, LIKE, GOAL)
    assert plan.chosen.attainment >= GOAL.attainment
    assert plan.chosen.fleet.gpus > 2
    for prefill in OFFERS:
        for decode in OFFERS:
            for prefills in range(1, plan.chosen.fleet.gpus):
                for decoders in range(1, plan.chosen.fleet.gpus):
                    fleet = Fleet(prefill, prefills, decode, decoders)
                    if fleet.gpus < plan.chosen.fleet.gpus:
                        report = simulate(fleet.cluster(LIKE), requests, GOAL.targets)
                        assert (report.summary.attainment or 0.0) < GOAL.attainment, str(fleet)


def test_the_prediction_is_near_what_the_simulator_finds() -> None:
    plan = find_plan(OFFERS, workload(rate=6.0), LIKE, GOAL)
    assert plan.chosen.predicted.attainment == pytest.approx(plan.chosen.attainment, rel=0.1)


def test_what_was_tried_is_told() -> None:
    told: list[Candidate] = []
    plan = find_plan(OFFERS, workload(rate=6.0), LIKE, GOAL, told.append)
    assert {id(one) for one in told} == {id(plan.chosen), *map(id, plan.rejected)}


def test_a_workload_beyond_the_budget_has_no_plan() -> None:
    with pytest.raises(NoPlan, match="no fleet of up to 2 GPUs"):
        find_plan(OFFERS, workload(rate=30.0), LIKE, replace(GOAL, max_gpus=2))
