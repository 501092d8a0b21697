"""Does the controller give each role what it needs, within its budget, and without going back and forth?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from baton.bench.summary import Targets
from baton.planning.controller import Add, Aims, Controller, Decision, Flip, Remove, Sight, Verdict
from baton.planning.demand import Arrived, Ended
from baton.planning.simulated import SimulatedPlanner
from baton.routing import Curve, Role, WorkerView
from baton.sim.cluster import SimCluster, WorkerSpec
from baton.sim.simulator import simulate
from baton.sim.speed import LinearSpeed
from baton.sim.workload import BlockIds, SimRequest

PREFILL, DECODE = Role.PREFILL, Role.DECODE
EVERY_S = 5.0
START_S = 15.0
# A prompt of 1000 tokens takes 0.2 s; 40 requests decode in time beside each other, 25 ms a token.
PREFILL_CURVE = Curve(((16, 0.0032), (2048, 0.4096)))
DECODE_CURVE = Curve(((1, 0.024), (40, 0.025), (64, 0.2)))
ONE = {PREFILL: 1, DECODE: 1}
# Tokens are due so soon that who decodes has next to no time for prompts; or any amount of it.
AIMS = Aims(budget=8, gpus=ONE, least=ONE, tpot_s=0.025)
UNHURRIED = replace(AIMS, tpot_s=0.25)


@dataclass
class Cluster:
    """As much of a cluster as the controller sees. Prompts that nobody computes pile up."""

    roles: dict[str, Role]
    aims: Aims = AIMS
    now_s: float = 0.0
    queued: float = 0.0
    starting: dict[str, tuple[Role, float]] = field(default_factory=dict)
    told: list[tuple[float, Decision]] = field(default_factory=list)
    started: int = 0
    staying: frozenset[str] = frozenset()
    prefills_beside: bool = True

    def __post_init__(self) -> None:
        self.controller = Controller(self.aims)

    @classmethod
    def of(cls, prefills: int, decoders: int, aims: Aims = AIMS) -> Cluster:
        roles = dict.fromkeys((f"p{n}" for n in range(prefills)), PREFILL)
        return cls(roles | dict.fromkeys((f"d{n}" for n in range(decoders)), DECODE), aims)

    def count(self, role: Role) -> int:
        return sum(one is role for one in self.roles.values())

    def after(self, requests: float, output_tokens: int = 100, prompt_tokens: int = 1000) -> Verdict:
        """Five seconds with so many requests per second; does what the controller says of them."""
        self.now_s += EVERY_S
        for name, (role, at_s) in list(self.starting.items()):
            if at_s <= self.now_s:
                del self.starting[name]
                self.roles[name] = role
        arrived = requests * EVERY_S
        able = self.count(PREFILL) * EVERY_S / (0.0002 * prompt_tokens)
        self.queued = max(0.0, self.queued + arrived - able)
        done = min(able, arrived)
        decoding = done / EVERY_S * output_tokens * 0.025
        verdict = self.controller.decide(
            Sight(
                now_s=self.now_s,
                elapsed_s=EVERY_S,
                workers=[self._view(*worker, decoding, prompt_tokens) for worker in self.roles.items()],
                arrived=Arrived(round(arrived), round(arrived) * prompt_tokens),
                ended=Ended(
                    round(done), round(done) * prompt_tokens, 0, round(done) * output_tokens,
                    round(done) * output_tokens * 0.025,
                ),
                waiting=0,
                starting={role: sum(one is role for one, _ in self.starting.values()) for role in ONE},
                gpus=len(self.roles) + len(self.starting),
                block_tokens=16,
                staying=self.staying,
                prefills_beside=self.prefills_beside,
            )
        )  # fmt: skip
        for decision in verdict.decisions:
            self.told.append((self.now_s, decision))
            self._do(decision)
        return verdict

    def run(self, seconds: float, requests: float, **lengths: int) -> Cluster:
        for _ in range(int(seconds / EVERY_S)):
            self.after(requests, **lengths)
        return self

    def flips(self) -> list[tuple[float, Flip]]:
        return [(at_s, one) for at_s, one in self.told if isinstance(one, Flip)]

    def _view(self, name: str, role: Role, decoding: float, prompt_tokens: int) -> WorkerView:
        share = decoding / max(1, self.count(DECODE)) if role is DECODE else 0
        queued = self.queued * prompt_tokens / max(1, self.count(PREFILL)) if role is PREFILL else 0
        return WorkerView(
            *(name, "1", "host:1", role),
            total_blocks=10_000,
            free_blocks=10_000,
            running=round(share),
            queued_tokens=round(queued),
            prefill_curve=PREFILL_CURVE,
            decode_curve=DECODE_CURVE,
        )

    def _do(self, decision: Decision) -> None:
        match decision:
            case Flip(name, role):
                assert self.roles[name] is not role
                self.roles[name] = role
            case Add(role, count):
                for _ in range(count):
                    self.started += 1
                    self.starting[f"new{self.started}"] = (role, self.now_s + START_S)
            case Remove(name, role):
                assert self.roles.pop(name) is role


def test_a_burst_of_prompts_takes_workers_from_decoding() -> None:
    cluster = Cluster.of(2, 6).run(60, requests=5)
    assert cluster.told == []
    cluster.run(30, requests=20)
    assert cluster.count(PREFILL) >= 5
    assert all(isinstance(one, Flip) for _, one in cluster.told)


def test_no_worker_is_taken_from_decoding_for_prompts_that_it_could_compute_as_well() -> None:
    cluster = Cluster.of(1, 7, UNHURRIED).run(60, requests=5).run(30, requests=20)
    assert cluster.told == []


def test_prefill_workers_that_are_not_missed_decode() -> None:
    assert Cluster.of(4, 4, UNHURRIED).run(30, requests=5).count(PREFILL) == 1
    assert Cluster.of(4, 4, AIMS).run(30, requests=5).count(PREFILL) == 4


def test_where_prompts_are_always_computed_apart_no_prefill_worker_is_spare() -> None:
    cluster = Cluster.of(4, 4, UNHURRIED)
    cluster.prefills_beside = False
    assert cluster.run(30, requests=5).count(PREFILL) == 4
    assert cluster.run(60, requests=25).count(PREFILL) > 4


def test_nobody_is_known_to_be_missed_by_none_while_nothing_comes() -> None:
    assert Cluster.of(4, 4, UNHURRIED).run(60, requests=0).told == []


def test_a_burst_beyond_all_prefill_capacity_is_recovered_from() -> None:
    cluster = Cluster.of(2, 2, replace(AIMS, budget=4)).run(60, requests=5).run(30, requests=30)
    assert cluster.queued > 100
    assert cluster.count(PREFILL) == 3
    cluster.run(120, requests=5)
    assert cluster.queued == 0


def test_to_catch_up_no_role_gives_workers_that_it_needs_to_keep_up() -> None:
    """Four workers are just enough for the prompts that come, three for what is decoded then."""
    cluster = Cluster.of(4, 3, replace(AIMS, budget=7)).run(60, requests=20, output_tokens=170)
    cluster.queued = 300
    assert cluster.after(20, output_tokens=170).load.prefill > 2
    assert cluster.run(30, requests=20, output_tokens=170).told == []


def test_long_answers_take_workers_from_prefill() -> None:
    cluster = Cluster.of(6, 2).run(60, requests=5)
    cluster.run(120, requests=5, output_tokens=1600)
    assert cluster.count(DECODE) >= 6


def test_the_ratio_is_changed_before_the_number_of_workers() -> None:
    cluster = Cluster.of(2, 5, replace(AIMS, budget=16)).run(60, requests=5).run(300, requests=20)
    first_added = next(at_s for at_s, one in cluster.told if isinstance(one, Add))
    flips = [at_s for at_s, _ in cluster.flips()]
    assert flips
    assert max(flips) < first_added


def test_what_no_flip_mends_makes_workers_come() -> None:
    cluster = Cluster.of(2, 2).run(300, requests=10, output_tokens=400)
    assert len(cluster.roles) > 4
    assert cluster.after(10, output_tokens=400).load.worst <= AIMS.utilization


def test_a_long_lull_makes_workers_go_down_to_the_least() -> None:
    cluster = Cluster.of(4, 4).run(AIMS.shrink_after_s, requests=0.5)
    assert len(cluster.roles) == 8
    cluster.run(10 * AIMS.shrink_after_s, requests=0.5)
    assert (cluster.count(PREFILL), cluster.count(DECODE)) == (1, 1)


def test_more_workers_than_the_budget_allows_go_at_once() -> None:
    cluster = Cluster.of(5, 5, replace(AIMS, budget=8)).run(15, requests=10)
    assert len(cluster.roles) == 8


def test_workers_that_have_to_stay_do_so_in_a_lull_and_beyond_the_budget() -> None:
    cluster = Cluster.of(4, 4)
    cluster.staying = frozenset({"d0", "d1", "p2"})
    cluster.run(3600, requests=0.01)
    assert set(cluster.roles) == cluster.staying
    cluster.controller = Controller(replace(AIMS, budget=2))
    cluster.run(60, requests=0.01)
    assert set(cluster.roles) == cluster.staying


def test_demand_is_what_arrives_and_not_what_comes_out() -> None:
    """Two workers that prefill put out the same at both rates."""
    slower = Cluster.of(2, 2, replace(AIMS, flip_share=0.0)).run(60, requests=12)
    faster = Cluster.of(2, 2, replace(AIMS, flip_share=0.0)).run(60, requests=24)
    assert faster.after(24).need.prompts_per_s > 1.9 * slower.after(12).need.prompts_per_s


def test_cached_prompts_need_no_computing() -> None:
    worker = WorkerView(
        "p", "1", "host:1", PREFILL, 100, 100, prefill_curve=PREFILL_CURVE, decode_curve=DECODE_CURVE
    )
    workers = [worker, replace(worker, worker_id="d", role=DECODE)]
    loads = [
        Controller(AIMS)
        .decide(
            Sight(
                *(5.0, 5.0, workers, Arrived(20, 20_000), Ended(20, 20_000, cached, 200, 5.0)),
                *(0, {}, 2, 16),
            )
        )
        .load
        for cached in (0, 15_000)
    ]
    assert loads[1].prefill == pytest.approx(loads[0].prefill / 4, rel=0.05)


def test_without_flips_a_worker_goes_so_that_another_can_come() -> None:
    cluster = Cluster.of(2, 6, replace(AIMS, flip_share=0.0)).run(60, requests=5).run(300, requests=18)
    assert not cluster.flips()
    assert cluster.count(PREFILL) > 2


DEMANDS = st.lists(
    st.tuples(st.floats(0, 60), st.integers(1, 1500), st.integers(100, 8000), st.integers(1, 12)),
    min_size=1,
    max_size=12,
)


@given(DEMANDS, st.integers(1, 8), st.integers(1, 8), st.sampled_from([0.0, 0.25, 1.0]))
@settings(max_examples=60)
def test_whatever_comes_the_budget_holds_and_no_role_is_left_empty(
    demands: list[tuple[float, int, int, int]], prefills: int, decoders: int, share: float
) -> None:
    cluster = Cluster.of(prefills, decoders, replace(AIMS, flip_share=share, shrink_after_s=30.0))
    allowed = max(AIMS.budget, prefills + decoders)
    for requests, output, prompt, rounds in demands:
        for _ in range(rounds):
            cluster.after(requests, output_tokens=output, prompt_tokens=prompt)
            devices = len(cluster.roles) + len(cluster.starting)
            assert devices <= allowed
            allowed = max(AIMS.budget, devices)
            assert min(cluster.count(PREFILL), cluster.count(DECODE)) >= 1
    for (before_s, before), (after_s, after) in pairwise(cluster.flips()):
        assert before.role is after.role or after_s - before_s >= AIMS.settle_s


@given(
    st.floats(1, 30),
    st.integers(10, 800),
    st.lists(st.floats(0.97, 1.03), min_size=60, max_size=60),
    st.integers(1, 7),
)
@settings(max_examples=25)
def test_steady_demand_that_fits_never_flips_a_worker_back(
    requests: float, output: int, noise: list[float], prefills: int
) -> None:
    assume(requests * (0.2 + output * 0.025 / 40) <= AIMS.utilization * 8)
    cluster = Cluster.of(prefills, 8 - prefills).run(300, requests, output_tokens=output)
    before = len(cluster.flips())
    for factor in noise:
        cluster.after(requests * factor, output_tokens=output)
    assert len({flip.role for _, flip in cluster.flips()[before:]}) <= 1


def test_in_the_simulator_a_burst_and_a_shift_are_served_better_than_by_any_fixed_ratio() -> None:
    speed = LinearSpeed((0.01, 2e-4, 0), (0.02, 1e-6, 2e-4), (0.02, 1e-6, 2e-4), 1000)
    spec = WorkerSpec(Role.HYBRID, speed, kv_blocks=3000, max_batch_requests=20)
    requests, at_s = [], 0.0
    while at_s < 180:
        long_prompts = at_s < 90
        at_s += 1 / 7 if at_s > 30 else 1 / 2
        prompt, answer = (1600, 10) if long_prompts else (100, 180)
        chain = BlockIds((), 16, 16, prompt // 16, len(requests))
        requests.append(SimRequest(at_s, prompt, answer, chain))

    def cluster(prefills: int) -> SimCluster:
        roles = [PREFILL] * prefills + [DECODE] * (4 - prefills)
        return SimCluster(tuple(replace(spec, role=role) for role in roles))

    targets = Targets(1.0, 0.04)
    fixed = [simulate(cluster(n), requests, targets).summary.attainment or 0.0 for n in (1, 2, 3)]
    aims = replace(AIMS, budget=4, tpot_s=0.04, settle_s=20.0)
    planner = SimulatedPlanner(Controller(aims), cluster(2), {}, 10.0)
    planned = simulate(cluster(2), requests, targets, controller=planner, interval_s=5.0)
    assert planned.summary.failed == 0
    assert (planned.summary.attainment or 0.0) > max(fixed)
