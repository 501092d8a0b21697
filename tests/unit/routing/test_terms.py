"""What the terms of a placement are made of: tiers, pulls, transfers, storage, urgency."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.events import TierCounts
from baton.routing import Candidate, ClusterView, Curve, Request, Role, Unplaceable, WorkerView, create_policy
from baton.routing.candidates import all_candidates
from baton.routing.cost import prefill_cost, transfer_s
from tests.unit.routing.clusters import (
    POLICIES,
    clusters,
    decoder,
    place,
    prefiller,
    prompt,
    requests,
    worker,
)

KIB = 1024


TIERED = {"host_bytes_per_s": 4e9, "disk_bytes_per_s": 5e8}


class TestExpected:
    def test_blocks_of_prompts_on_their_way_to_a_worker_need_no_computing_there(self) -> None:
        request = prompt(2000, expected={"p0": 100}, held={"p0": 20})
        assert prefill_cost(prefiller(), request).cached_tokens == 1600
        assert prefill_cost(prefiller("p1"), request).cached_tokens == 0

    def test_a_burst_that_begins_alike_goes_to_one_worker(self) -> None:
        request = prompt(2000, expected={"p0": 120})
        busy = prefiller("p0", waiting=1, queued_tokens=1000)
        assert place(request, busy, prefiller("p1"), decoder()).computing.worker_id == "p0"

    def test_nobody_pulls_what_is_only_expected(self) -> None:
        request = prompt(2000, expected={"p0": 120})
        busy = prefiller("p0", waiting=9, queued_tokens=90_000)
        placement = place(request, busy, prefiller("p1"), decoder())
        assert (placement.computing.worker_id, placement.pull) == ("p1", None)


class TestCurve:
    @given(st.dictionaries(st.integers(1, 4096), st.floats(1e-4, 10.0), max_size=8))
    def test_more_work_never_looks_faster_however_noisy_the_measurement(
        self, points: dict[int, float]
    ) -> None:
        curve = Curve.measured((float(size), seconds) for size, seconds in points.items())
        seconds = [curve.seconds(size) for size in range(0, 9000, 97)]
        assert all(later >= sooner - 1e-9 for sooner, later in pairwise(seconds))

    def test_what_rises_is_left_as_it_was_measured(self) -> None:
        assert Curve.measured([(2.0, 0.2), (1.0, 0.1)]).points == ((1.0, 0.1), (2.0, 0.2))

    def test_neighbours_that_fall_meet_in_the_middle(self) -> None:
        assert Curve.measured([(1.0, 0.1), (2.0, 0.4), (4.0, 0.2)]).points == (
            (1.0, 0.1),
            (3.0, pytest.approx(0.3)),
        )


class TestTiers:
    def test_blocks_in_host_memory_are_read_where_that_is_faster_than_computing(self) -> None:
        request = prompt(2000, held={"p0": 100}, tiers={"p0": TierCounts(device=20, host=80)})
        cost = prefill_cost(prefiller(**TIERED), request)
        assert cost.tier_s == pytest.approx(80 * 64 * KIB / 4e9)
        assert cost.cached_tokens == 1600

    def test_blocks_on_a_slow_disk_are_computed(self) -> None:
        request = prompt(2000, held={"p0": 100}, tiers={"p0": TierCounts(device=20, host=60, disk=20)})
        cost = prefill_cost(prefiller(host_bytes_per_s=4e9, disk_bytes_per_s=1e6), request)
        assert cost.cached_tokens == 80 * 16

    def test_blocks_in_a_tier_of_unknown_speed_are_not_counted_on(self) -> None:
        request = prompt(2000, held={"p0": 100}, tiers={"p0": TierCounts(device=20, host=80)})
        assert prefill_cost(prefiller(), request).cached_tokens == 20 * 16

    def test_the_worker_that_has_the_prefix_on_its_device_is_preferred(self) -> None:
        tiers = {"p0": TierCounts(disk=100), "p1": TierCounts(device=100)}
        request = prompt(2000, held={"p0": 100, "p1": 100}, tiers=tiers)
        disk, device = prefiller("p0", **TIERED), prefiller("p1", **TIERED)
        assert place(request, disk, device, decoder()).computing.worker_id == "p1"

    @given(st.integers(0, 120), st.integers(0, 120), st.integers(0, 120), st.floats(0, 1e12))
    def test_a_slower_tier_is_never_cheaper(self, device: int, host: int, disk: int, speed: float) -> None:
        total = device + host + disk
        request = prompt(6000, held={"p0": total})
        tiered = replace(request, tiers={"p0": TierCounts(device, host, disk)})
        view = prefiller(host_bytes_per_s=speed, disk_bytes_per_s=speed / 2)
        on_device, below = prefill_cost(view, request), prefill_cost(view, tiered)
        assert below.work_s >= on_device.work_s - 1e-9
        nothing = prefill_cost(view, replace(request, held={"p0": device}))
        assert below.work_s <= nothing.work_s + 1e-9


class TestPulls:
    def test_a_prefix_is_pulled_where_reading_is_faster(self) -> None:
        request = prompt(4000, held={"d1": 200})
        placement = place(request, prefiller(), decoder("d0"), decoder("d1", running=60, waiting=60))
        assert placement.decode.worker_id == "d0"
        assert placement.pull is not None
        assert (placement.pull.worker.worker_id, placement.pull.blocks) == ("d1", 200)
        assert placement.compute_tokens == 4000 - 200 * 16

    def test_a_whole_prompt_is_pulled_to_where_it_is_decoded(self) -> None:
        request = prompt(3200, held={"d1": 200})
        placement = place(request, prefiller(), decoder("d0"), decoder("d1", running=60, waiting=60))
        assert (placement.pair, placement.reason) == (("d0", "d0"), "pulled")

    def test_a_prefix_is_computed_where_reading_is_slower(self) -> None:
        slow = prefiller(read_bytes_per_s={"p1": 1e6})
        request = prompt(4000, held={"p1": 200})
        busy = prefiller("p1", queued_tokens=40_000)
        placement = place(request, slow, busy, decoder(running=20))
        assert (placement.computing.worker_id, placement.pull) == ("p0", None)

    def test_the_faster_of_two_sources_is_read(self) -> None:
        near_far = prefiller(read_bytes_per_s={"a": 1e8, "b": 1e10})
        request = prompt(4000, held={"a": 200, "b": 200})
        sources = [worker("a", Role.HYBRID), worker("b", Role.HYBRID)]
        pull = prefill_cost(near_far, request, sources).pull
        assert pull is not None
        assert pull.worker.worker_id == "b"

    def test_a_bandwidth_nobody_measured_is_taken_to_be_the_slowest_measured(self) -> None:
        view = prefiller(read_bytes_per_s={"a": 1e8, "b": 1e10})
        assert view.bandwidth_from("c") == 1e8
        assert prefiller(read_bytes_per_s={}).bandwidth_from("c") == 1e9

    @given(clusters(), requests())
    def test_only_what_is_predicted_faster_is_pulled(self, cluster: ClusterView, request: Request) -> None:
        for candidate in candidates_of(request, cluster):
            placement = candidate.placement
            alone = prefill_cost(placement.computing, request)
            if placement.pull is None:
                continue
            source = placement.pull.worker
            assert source is not placement.computing
            assert source.worker_id not in request.avoid
            assert 0 < placement.pull.blocks <= request.held[source.worker_id]
            terms = placement.terms
            assert terms.tier_s + terms.pull_s + terms.compute_s < alone.work_s


class TestOtherTerms:
    def test_the_faster_link_between_the_two_decides(self) -> None:
        far = decoder("d0", read_bytes_per_s={"p0": 1e7})
        near = decoder("d1", read_bytes_per_s={"p0": 1e10})
        assert place(prompt(3000), prefiller(), far, near).decode.worker_id == "d1"

    def test_what_the_decode_worker_holds_is_not_transferred(self) -> None:
        view = decoder(read_bytes_per_s={"p0": 1e8})
        cold, warm = (transfer_s(view, prefiller(), prompt(1600, held={"d0": n})) for n in (0, 90))
        assert cold - warm == pytest.approx(90 * 64 * KIB / 1e8)

    def test_a_full_pool_is_spared_a_copy_that_another_already_has(self) -> None:
        full = {"cached_blocks": 2048, "read_bytes_per_s": {"h0": 1e11, "h1": 1e11}}
        holder = worker("h0", Role.HYBRID, queued_tokens=120, **full)
        request = prompt(4000, held={"h0": 240})
        assert place(request, holder, worker("h1", Role.HYBRID, **full)).decode.worker_id == "h0"
        roomy = {**full, "cached_blocks": 0}
        assert place(request, holder, worker("h1", Role.HYBRID, **roomy)).decode.worker_id == "h1"

    def test_batch_work_waits_for_the_prefix_that_interactive_work_computes_again(self) -> None:
        holder = prefiller("p1", queued_tokens=4000)
        workers = [prefiller("p0", read_bytes_per_s={"p1": 1e6}), holder, decoder(running=30)]
        request = prompt(2000, held={"p1": 120})
        assert place(request, *workers).computing.worker_id == "p0"
        assert place(replace(request, slo="batch"), *workers).computing.worker_id == "p1"

    def test_a_conversation_stays_where_it_was_if_nothing_speaks_against_it(self) -> None:
        workers = [prefiller(), *(decoder(f"d{n}") for n in range(4))]
        for name in ("d0", "d3"):
            assert place(prompt(600, session_worker=name), *workers).decode.worker_id == name
        busy = [replace(w, running=30) if w.worker_id == "d0" else w for w in workers]
        assert place(prompt(600, session_worker="d0"), *busy).decode.worker_id != "d0"

    def test_the_backlog_counts_prompts_not_one_long_one(self) -> None:
        curve = Curve(((1000.0, 1.0), (10_000.0, 30.0)))
        one = prefiller(queued_tokens=10_000, waiting=1, prefill_curve=curve)
        ten = replace(one, waiting=10)
        assert (one.backlog_s, ten.backlog_s) == (30.0, 10.0)


class TestSession:
    def test_every_router_chooses_the_same_worker_and_only_its_own_conversations_move(self) -> None:
        workers = [prefiller(), *(decoder(f"d{n}") for n in range(5))]

        def where(views: list[WorkerView], seed: int) -> dict[str, str]:
            policy = create_policy("session", Random(seed))
            return {
                name: policy.place(prompt(100, session=name), ClusterView(views)).decode.worker_id
                for name in map(str, range(200))
            }

        before = where(workers, 1)
        assert before == where(workers, 2)
        after = where([w for w in workers if w.worker_id != "d2"], 1)
        assert {name for name in before if before[name] != after[name]} == {
            name for name in before if before[name] == "d2"
        }
        counts = [list(before.values()).count(f"d{n}") for n in range(5)]
        assert min(counts) > 20

    def test_a_request_without_a_session_goes_to_the_emptiest(self) -> None:
        placement = place(prompt(100), decoder("d0", running=2), decoder("d1"), policy="session")
        assert placement.decode.worker_id == "d1"


def candidates_of(request: Request, cluster: ClusterView) -> list[Candidate]:
    try:
        return all_candidates(request, cluster)
    except Unplaceable:
        return []


@pytest.mark.parametrize("policy", POLICIES)
@given(cluster=clusters(), request=requests(), seed=st.integers(0, 3))
def test_what_is_explained_first_is_what_is_placed(
    policy: str, cluster: ClusterView, request: Request, seed: int
) -> None:
    try:
        explained = create_policy(policy, Random(seed)).explain(request, cluster)
    except Unplaceable:
        return
    placement = create_policy(policy, Random(seed)).place(request, cluster)
    assert explained[0].placement == placement
    assert [c.total_s for c in explained[1:]] == sorted(c.total_s for c in explained[1:])
    pairs = [candidate.placement.pair for candidate in explained]
    assert len(pairs) == len(set(pairs))


def test_explaining_takes_no_turn() -> None:
    policy = create_policy("round-robin", Random(0))
    cluster = ClusterView([decoder("a"), decoder("b")])
    for _ in range(3):
        policy.explain(prompt(100), cluster)
    assert policy.place(prompt(100), cluster).decode.worker_id == "a"


def test_everything_that_can_be_chosen_is_explained() -> None:
    workers = [*(prefiller(f"p{n}") for n in range(9)), *(decoder(f"d{n}") for n in range(9))]
    explained = create_policy("prefix", Random(0)).explain(prompt(600), ClusterView(workers))
    assert len(explained) == 9 * 9 + 9
