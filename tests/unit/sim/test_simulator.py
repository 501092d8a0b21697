"""What must hold of every simulation: nothing is lost, nothing comes early, nobody does more than it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.bench.summary import Targets
from baton.bench.trace import TraceRow
from baton.routing import Role
from baton.routing.admission import Limits
from baton.sim.clock import Clock
from baton.sim.cluster import (
    Action,
    AddWorker,
    Failure,
    Observed,
    RemoveWorker,
    SetRole,
    SimCluster,
    WorkerSpec,
)
from baton.sim.network import Card, Network
from baton.sim.peers import PrefillFirst
from baton.sim.profiles import speed_of
from baton.sim.report import SimReport
from baton.sim.simulator import simulate
from baton.sim.speed import Chunk, LinearSpeed, TableSpeed
from baton.sim.workload import from_trace

SPEED = LinearSpeed((0.010, 1e-4, 1e-9), (0.010, 1e-7, 2e-4), (0.010, 1e-7, 2e-4), 1000)
BLOCK = 16


def spec(role: Role, **changes: int) -> WorkerSpec:
    base = WorkerSpec(role, SPEED, kv_blocks=400, max_batch_tokens=256, max_batch_requests=8)
    return replace(base, **changes)  # type: ignore[arg-type]


SPLIT = (spec(Role.PREFILL), spec(Role.PREFILL), spec(Role.DECODE), spec(Role.DECODE))
ALIKE = (spec(Role.HYBRID),) * 3
PROMPTS_FIRST = tuple(replace(worker, scheduler=PrefillFirst) for worker in ALIKE)


def chained(blocks: Sequence[int]) -> tuple[int, ...]:
    """Ids as traces have them: each stands for a block and all before it."""
    ids = [1]
    for block in blocks:
        ids.append(ids[-1] * 7 + block)
    return tuple(ids[1:])


ROWS = st.lists(
    st.builds(
        lambda gap, tokens, output, ids: (gap, TraceRow(0.0, tokens, output, ids, 64)),
        st.floats(0, 0.2),
        st.integers(1, 900),
        st.integers(1, 60),
        st.lists(st.integers(0, 6), max_size=8).map(chained),
    ),
    min_size=1,
    max_size=30,
)
CLUSTERS = st.builds(
    SimCluster,
    workers=st.sampled_from([SPLIT, ALIKE, SPLIT + ALIKE, PROMPTS_FIRST]),
    block_tokens=st.just(BLOCK),
    kv_bytes_per_token=st.sampled_from([1000, 1_000_000]),
    policy=st.sampled_from(["prefix", "least-loaded", "random"]),
    routers=st.integers(1, 2),
    weighed=st.sampled_from([1, 32]),
    failures=st.lists(
        st.builds(
            Failure,
            st.floats(0, 3),
            st.sampled_from(["prefill-0", "decode-2", "hybrid-1", "hybrid-5"]),
            st.floats(0.1, 2),
        ),
        max_size=2,
    ).map(tuple),
)


def timed(rows: Sequence[tuple[float, TraceRow]]) -> list[TraceRow]:
    now_s, found = 0.0, []
    for gap_s, row in rows:
        now_s += gap_s
        found.append(replace(row, arrival_s=now_s))
    return found


def run(cluster: SimCluster, rows: Sequence[TraceRow], seed: int = 0) -> SimReport:
    return simulate(cluster, from_trace(rows, cluster.block_tokens), Targets(1.0, 0.1), seed=seed)


class TestEverySimulation:
    @given(CLUSTERS, ROWS)
    @settings(max_examples=60)
    def test_ends_with_every_request_answered_in_full(
        self, cluster: SimCluster, rows: list[tuple[float, TraceRow]]
    ) -> None:
        asked = timed(rows)
        report = run(cluster, asked)
        assert report.summary.requests == len(asked)
        assert report.summary.errors == {}
        wanted = sorted((row.arrival_s, row.input_tokens, row.output_tokens) for row in asked)
        got = sorted((r.scheduled_s, r.input_tokens, r.output_tokens) for r in report.records)
        assert got == wanted

    @given(CLUSTERS, ROWS)
    @settings(max_examples=40)
    def test_has_no_effect_before_its_cause(
        self, cluster: SimCluster, rows: list[tuple[float, TraceRow]]
    ) -> None:
        fastest_s = min(SPEED.prefill[0], SPEED.decode[0])
        for record in run(cluster, timed(rows)).records:
            assert isfinite(record.end_s)
            assert record.ttft_s >= fastest_s
            assert record.end_s >= record.first_s
            assert 0 <= record.cached_tokens < record.input_tokens + record.output_tokens

    @given(CLUSTERS, ROWS)
    @settings(max_examples=40)
    def test_keeps_workers_and_pools_within_what_they_have(
        self, cluster: SimCluster, rows: list[tuple[float, TraceRow]]
    ) -> None:
        report = run(cluster, timed(rows))
        for worker in report.workers:
            assert worker.utilization <= 1 + 1e-9
            assert worker.most_in_use <= 400
            seconds = worker.until_s - worker.from_s
            assert worker.received_bytes <= 12.5e9 * seconds * (1 + 1e-9) + 1

    @given(CLUSTERS, ROWS, st.integers(0, 3))
    @settings(max_examples=20)
    def test_is_the_same_again_with_the_same_seed(
        self, cluster: SimCluster, rows: list[tuple[float, TraceRow]], seed: int
    ) -> None:
        asked = timed(rows)
        first, second = run(cluster, asked, seed), run(cluster, asked, seed)
        # As text: what never happened is nan, which equals nothing.
        assert [repr(record) for record in first.records] == [repr(record) for record in second.records]
        assert first.events == second.events


def test_one_request_alone_takes_what_its_steps_and_messages_take() -> None:
    cluster = SimCluster((spec(Role.HYBRID),), BLOCK, network_s=0.001, router_s=0.002)
    [record] = run(cluster, [TraceRow(0.0, 200, 11)]).records
    prefill_s = SPEED.step_s(0, 0, [Chunk(0, 200)])
    # router, Start, and the token's way back over the router
    assert record.ttft_s == pytest.approx(0.002 + 0.001 + prefill_s + 0.002)
    steps_s = [SPEED.step_s(1, context, []) for context in range(201, 211)]
    assert record.tpot_s == pytest.approx(sum(steps_s) / 10)


def test_a_prompt_from_elsewhere_waits_for_its_bytes() -> None:
    slow = tuple(replace(worker, network_bytes_per_s=1e6) for worker in (SPLIT[0], SPLIT[2]))
    cluster = SimCluster(slow, BLOCK, kv_bytes_per_token=10_000, policy="round-robin")
    report = run(cluster, [TraceRow(0.0, 160, 3)])
    [record] = report.records
    assert report.placements == {"remote": 1}
    assert record.end_s - record.first_s > 160 * 10_000 / 1e6
    assert record.ttft_s < 0.1, "the first token does not wait for the KV"


def test_a_prefix_that_is_cached_is_not_computed_again() -> None:
    rows = [TraceRow(0.0, 640, 2, tuple(range(10)), 64), TraceRow(5.0, 640, 2, tuple(range(10)), 64)]
    report = run(SimCluster((spec(Role.HYBRID),), BLOCK), rows)
    assert [record.cached_tokens for record in report.records] == [0, 624]
    assert report.hit_rate == pytest.approx(624 / 1280)


def test_a_prefix_that_a_busy_worker_has_is_pulled_by_another() -> None:
    ids = tuple(range(10))
    rows = [TraceRow(0.0, 640, 400, ids, 64), TraceRow(0.5, 704, 2, (*ids, 99), 64)]
    report = run(SimCluster(ALIKE, BLOCK, kv_bytes_per_token=1000), rows)
    assert (report.cached_tokens, report.pulled_tokens) == (640, 640)
    assert sorted(worker.computed_tokens for worker in report.workers) == [0, 64, 640]
    blind = run(SimCluster(ALIKE, BLOCK, kv_bytes_per_token=1000, policy="round-robin"), rows)
    assert blind.pulled_tokens == 0


def test_requests_that_can_never_fit_fail_by_name() -> None:
    report = run(SimCluster((spec(Role.HYBRID, kv_blocks=4),), BLOCK), [TraceRow(0.0, 640, 2)])
    assert report.summary.errors == {"service_unavailable_error": 1}


def test_what_a_prefill_worker_refuses_is_computed_elsewhere() -> None:
    cluster = SimCluster((spec(Role.PREFILL, max_waiting=1), spec(Role.DECODE)), BLOCK, policy="round-robin")
    report = run(cluster, [TraceRow(0.0, 800, 2) for _ in range(20)])
    assert report.summary.failed == 0
    assert min(worker.computed_tokens for worker in report.workers) > 0


def test_the_door_turns_away_what_would_wait_too_long() -> None:
    limits = Limits(4, 2, 2, {"interactive": 0.5, "batch": 5.0})
    rows = [TraceRow(0.0, 800, 40) for _ in range(40)]
    report = run(SimCluster((spec(Role.HYBRID),), BLOCK, admission=limits), rows)
    assert report.summary.requests == 40
    assert report.summary.failed > 0
    assert set(report.summary.errors) <= {"queue_full", "displaced", "too_late", "queue_timeout"}


def test_a_controller_changes_roles_and_workers_while_it_runs() -> None:
    seen: list[Observed] = []

    def controller(observed: Observed) -> Sequence[Action]:
        seen.append(observed)
        match len(seen):
            case 1:
                return [SetRole("hybrid-0", Role.PREFILL), AddWorker("new", spec(Role.DECODE), 0.5)]
            case 3:
                return [RemoveWorker("hybrid-1")]
        return []

    rows = [TraceRow(0.1 * number, 100, 5) for number in range(100)]
    report = simulate(
        SimCluster(ALIKE, BLOCK), from_trace(rows, BLOCK), controller=controller, interval_s=1.0
    )
    assert report.summary.failed == 0
    assert {worker.worker_id for worker in seen[-1].workers} == {"hybrid-0", "hybrid-2", "new"}
    assert sum(observed.arrived for observed in seen) >= 90
    assert report.placements["remote"] > 0
    new = next(worker for worker in report.workers if worker.worker_id == "new")
    assert new.from_s == 1.5
    assert new.output_tokens > 0


@pytest.mark.parametrize(("itl_target_s", "least", "most"), [(0.5, 1.3, 1.8), (0.0, 1.0, 1.0)])
def test_a_worker_with_an_itl_target_says_that_its_steps_take_longer_than_they_did_at_its_start(
    itl_target_s: float, least: float, most: float
) -> None:
    seen: list[Observed] = []

    def controller(observed: Observed) -> Sequence[Action]:
        seen.append(observed)
        return []

    # At its start it measured short contexts: steps of 10.8 ms, where these take 18.
    speed = LinearSpeed((0.010, 1e-4, 0.0), (0.010, 1e-5, 2e-4), (0.010, 1e-5, 2e-4), 1000)
    worker = replace(spec(Role.HYBRID), speed=speed, itl_target_s=itl_target_s)
    requests = from_trace([TraceRow(0.0, 700, 200), TraceRow(2.5, 20, 200)], BLOCK)
    simulate(SimCluster((worker,), BLOCK), requests, controller=controller, interval_s=1.0)
    assert least <= seen[-1].workers[0].step_factor <= most


class TestNetwork:
    def test_flows_share_a_card_evenly(self) -> None:
        clock, ends = Clock(), []
        network = Network(clock)
        source, fast = Card(100.0), Card(1000.0)
        network.send(source, fast, 100.0, lambda: ends.append(clock.now_s))
        network.send(source, fast, 300.0, lambda: ends.append(clock.now_s))
        clock.run(1e9)
        assert ends == [pytest.approx(2.0), pytest.approx(4.0)]
        assert (source.sent, fast.received) == (pytest.approx(400.0), pytest.approx(400.0))

    def test_a_flow_that_stops_leaves_its_share_to_others(self) -> None:
        clock, ends = Clock(), []
        network = Network(clock)
        source, target = Card(100.0), Card(1000.0)
        network.send(source, target, 150.0, lambda: ends.append(clock.now_s))
        other = network.send(source, target, 1000.0, lambda: ends.append(clock.now_s))
        clock.after(1.0, network.stop, other)
        clock.run(1e9)
        assert ends == [pytest.approx(2.0)]


class TestSpeed:
    def test_a_table_gives_back_what_was_measured(self) -> None:
        decode = {(1, 64): 0.01, (8, 64): 0.02, (1, 512): 0.011, (8, 512): 0.028}
        speed = TableSpeed({64: 0.05, 512: 0.4}, decode)
        assert speed.prefill_s([Chunk(0, 512)]) == pytest.approx(0.4)
        for (batch, context), seconds in decode.items():
            assert speed.step_s(batch, batch * context, []) == pytest.approx(seconds)

    def test_what_context_adds_is_read_off_contexts_that_lie_far_apart(self) -> None:
        # From 256 to 512 tokens noise of 1.5 ms looks like 6 us per token.
        decode = {(1, 256): 0.0435, (1, 512): 0.045, (8, 512): 0.05, (1, 8192): 0.0465}
        line = TableSpeed({64: 0.05}, decode).decode_line(1)
        assert line.per_token_s == pytest.approx(0.0015 / 7680, rel=0.05)

    @pytest.mark.parametrize("name", ["distserve:opt-13b:2", "splitwise:llama2-70b:h100-80gb:8"])
    def test_published_ones_grow_with_tokens_batch_and_context(self, name: str) -> None:
        speed = speed_of(name)
        assert 0 < speed.prefill_s([Chunk(0, 128)]) < speed.prefill_s([Chunk(0, 2048)])
        assert 0 < speed.step_s(1, 512, []) < speed.step_s(32, 32 * 512, []) < speed.step_s(32, 32 * 4096, [])
