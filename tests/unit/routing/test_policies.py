"""What each policy does with recorded cluster states, and what every policy must never do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.config import BadSetting
from baton.routing import ClusterView, Request, Role, Unplaceable, WorkerView, create_policy
from tests.unit.routing.clusters import (
    POLICIES,
    clusters,
    decoder,
    place,
    prefiller,
    prompt,
    requests,
    unknown,
)


class TestPrefix:
    @pytest.mark.parametrize("tokens", [40, 100, 600, 3000])
    def test_an_idle_pair_prefills_remotely(self, tokens: int) -> None:
        placement = place(prompt(tokens), prefiller(), decoder())
        assert placement.prefill is not None
        assert placement.prefill.worker_id == "p0"
        assert placement.decode.worker_id == "d0"
        assert placement.reason == "remote"

    @pytest.mark.parametrize("tokens", [17, 100, 3000])
    def test_an_idle_pair_with_unmeasured_curves_prefills_remotely(self, tokens: int) -> None:
        placement = place(prompt(tokens), unknown(prefiller()), unknown(decoder()))
        assert placement.prefill is not None

    @pytest.mark.parametrize(
        ("p", "d"), [(prefiller(), unknown(decoder())), (unknown(prefiller()), decoder())]
    )
    def test_a_half_measured_pair_prefills_remotely(self, p: WorkerView, d: WorkerView) -> None:
        assert place(prompt(600), p, d).prefill is not None

    def test_a_prompt_within_one_block_is_computed_where_it_is_decoded(self) -> None:
        assert place(prompt(10), prefiller(), decoder()).prefill is None

    def test_without_prefill_workers_the_decode_worker_prefills(self) -> None:
        placement = place(prompt(600), decoder())
        assert (placement.decode.worker_id, placement.prefill) == ("d0", None)
        assert placement.reason == "no prefill worker"

    def test_a_prompt_that_the_decode_worker_holds_stays_there(self) -> None:
        placement = place(prompt(600, held={"d1": 37}), prefiller(), decoder("d0"), decoder("d1"))
        assert (placement.decode.worker_id, placement.prefill, placement.reason) == ("d1", None, "cached")

    def test_the_next_turn_of_a_chat_stays_with_its_decode_worker_while_that_is_quiet(self) -> None:
        slow = {"read_bytes_per_s": {"d1": 1e8}}
        placement = place(prompt(2000, held={"d1": 120}), prefiller(**slow), decoder("d0"), decoder("d1"))
        assert (placement.decode.worker_id, placement.prefill) == ("d1", None)

    def test_the_next_turn_of_a_chat_returns_to_a_busy_decode_worker_whose_prefix_is_read(self) -> None:
        request = prompt(2000, held={"d1": 120})
        placement = place(request, prefiller(), decoder("d0", running=12), decoder("d1", running=12))
        assert (placement.decode.worker_id, placement.reason) == ("d1", "remote")
        assert placement.pull is not None
        assert (placement.pull.worker.worker_id, placement.pull.blocks) == ("d1", 120)

    def test_a_busy_decode_worker_is_spared_a_prefill(self) -> None:
        busy = decoder("d1", running=24)
        placement = place(prompt(2000, held={"d1": 90}), prefiller(), busy)
        assert placement.prefill is not None

    def test_a_long_queue_at_the_prefill_worker_makes_an_idle_decode_worker_prefill(self) -> None:
        placement = place(prompt(600), prefiller(queued_tokens=8000), decoder())
        assert (placement.prefill, placement.reason) == (None, "faster here")

    def test_requests_decoding_weigh_against_prefilling_beside_them(self) -> None:
        placement = place(prompt(600), prefiller(queued_tokens=2000), decoder(running=16))
        assert placement.prefill is not None

    @pytest.mark.parametrize("there", [{"running": 1}, {"waiting": 1}], ids=["decoding", "on its way"])
    def test_one_answer_is_reason_enough_to_wait_for_the_prefill_worker(self, there: dict[str, int]) -> None:
        busy = prefiller(queued_tokens=450, waiting=2)
        assert place(prompt(600), busy, decoder()).prefill is None
        assert place(prompt(600), busy, decoder(**there)).prefill is not None

    def test_a_decode_worker_that_keeps_to_its_itl_target_takes_a_prompt_beside_answers(self) -> None:
        busy = prefiller(queued_tokens=2000, waiting=2)
        assert place(prompt(600), busy, decoder(running=4)).prefill is not None
        assert place(prompt(600), busy, decoder(running=4, itl_target_s=0.05)).prefill is None
        assert place(prompt(600), busy, decoder(running=4, itl_target_s=0.001)).prefill is not None

    def test_the_prefill_worker_that_holds_the_prefix_gets_the_prompt(self) -> None:
        placement = place(prompt(2000, held={"p1": 100}), prefiller("p0"), prefiller("p1"), decoder())
        assert placement.prefill is not None
        assert placement.prefill.worker_id == "p1"

    def test_a_cached_prefix_does_not_make_up_for_a_longer_queue(self) -> None:
        holder = prefiller("p1", queued_tokens=6000)
        placement = place(prompt(1000, held={"p1": 40}), prefiller("p0"), holder, decoder())
        assert placement.prefill is not None
        assert placement.prefill.worker_id == "p0"

    def test_the_decode_worker_that_needs_to_read_less_is_taken(self) -> None:
        slow = {"read_bytes_per_s": {"p0": 1e8}}
        request = prompt(2000, held={"d1": 60, "p0": 125})
        placement = place(request, prefiller(), decoder("d0", **slow), decoder("d1", **slow))
        assert placement.decode.worker_id == "d1"

    def test_the_emptier_batch_is_taken(self) -> None:
        placement = place(prompt(600), prefiller(), decoder("d0", running=8), decoder("d1", running=2))
        assert placement.decode.worker_id == "d1"

    def test_a_decode_worker_without_free_blocks_is_passed_over(self) -> None:
        full = decoder("d0", running=1, free_blocks=10)
        placement = place(prompt(600), prefiller(), full, decoder("d1", running=8))
        assert placement.decode.worker_id == "d1"

    def test_when_all_are_full_one_is_taken_all_the_same(self) -> None:
        placement = place(prompt(600), prefiller(), decoder(running=40, free_blocks=3))
        assert placement.decode.worker_id == "d0"

    def test_the_prediction_is_queue_plus_compute(self) -> None:
        placement = place(prompt(1024), prefiller(queued_tokens=256), decoder())
        assert placement.terms.first_token_s == pytest.approx(0.120 + 0.520, abs=0.01)


class TestOthers:
    def test_least_loaded_takes_the_shortest_queue_and_batch(self) -> None:
        workers = [
            prefiller("p0", queued_tokens=100),
            prefiller("p1", queued_tokens=50),
            decoder("d0", running=3),
            decoder("d1", running=1, waiting=1),
        ]
        placement = place(prompt(600, held={"p0": 30, "d0": 37}), *workers, policy="least-loaded")
        assert placement.prefill is not None
        assert (placement.prefill.worker_id, placement.decode.worker_id) == ("p1", "d1")

    def test_round_robin_takes_turns_when_workers_come_and_go(self) -> None:
        policy = create_policy("round-robin", Random(0))

        def turn(*names: str) -> str:
            return policy.place(prompt(100), ClusterView([decoder(n) for n in names])).decode.worker_id

        assert [turn("b", "a", "c") for _ in range(4)] == ["a", "b", "c", "a"]
        assert [turn("c", "d"), turn("c", "d"), turn("a", "c")] == ["c", "d", "a"]

    def test_an_unknown_policy_is_refused_by_name(self) -> None:
        with pytest.raises(BadSetting, match="fastest"):
            create_policy("fastest", Random(0))


@pytest.mark.parametrize("policy", POLICIES)
class TestEvery:
    def test_no_decode_worker(self, policy: str) -> None:
        with pytest.raises(Unplaceable, match="no decode worker"):
            place(prompt(100), prefiller(), policy=policy)

    def test_too_large_for_every_pool_names_both_sizes(self, policy: str) -> None:
        with pytest.raises(Unplaceable, match=r"needs 3000 .* has 2048"):
            place(prompt(100, blocks=3000), prefiller(), decoder(), policy=policy)

    def test_the_cache_does_not_matter_for_who_may_be_chosen(self, policy: str) -> None:
        workers = [prefiller("p0", draining=True), decoder("d0", draining=True), decoder("d1"), decoder("d2")]
        request = prompt(600, held={"p0": 37, "d0": 37, "d1": 37}, avoid=frozenset({"d1"}))
        placement = place(request, *workers, policy=policy)
        assert (placement.decode.worker_id, placement.prefill) == ("d2", None)

    @pytest.mark.parametrize("measured", [True, False])
    def test_equal_workers_get_equal_work(self, policy: str, measured: bool) -> None:
        """4 + 4 workers, each request lasting while 40 others come; none exceeds 1.3 x the mean."""
        chooser = create_policy(policy, Random(7))
        workers = {w.worker_id: w for i in range(4) for w in (prefiller(f"p{i}"), decoder(f"d{i}"))}
        if not measured:
            workers = {name: unknown(w) for name, w in workers.items()}
        counts: Counter[str] = Counter()
        live: list[tuple[str, str | None]] = []
        rng = Random(3)
        for _ in range(2000):
            request = prompt(rng.randint(100, 800))
            placement = chooser.place(request, ClusterView(list(workers.values())))
            d = placement.decode.worker_id
            p = placement.prefill.worker_id if placement.prefill else None
            counts[d] += 1
            workers[d] = replace(workers[d], running=workers[d].running + 1)
            if p:
                counts[p] += 1
                workers[p] = replace(workers[p], queued_tokens=workers[p].queued_tokens + 400)
            live.append((d, p))
            if len(live) > 40:
                d, p = live.pop(0)
                workers[d] = replace(workers[d], running=workers[d].running - 1)
                if p:
                    workers[p] = replace(workers[p], queued_tokens=workers[p].queued_tokens - 400)
        for kind in "pd":
            shares = [counts[f"{kind}{i}"] for i in range(4)]
            assert max(shares) <= 1.3 * sum(shares) / 4, shares


@given(clusters(), requests(), st.sampled_from(POLICIES), st.integers(0, 3))
def test_a_placement_is_always_one_that_can_work(
    cluster: ClusterView, request: Request, policy: str, seed: int
) -> None:
    able = {
        w.worker_id
        for w in cluster.workers
        if w.role.decodes
        and not w.draining
        and w.worker_id not in request.avoid
        and w.total_blocks >= request.blocks
    }
    try:
        placement = create_policy(policy, Random(seed)).place(request, cluster)
    except Unplaceable:
        assert not able
        return
    assert placement.decode.worker_id in able
    assert 0.0 <= placement.terms.first_token_s < float("inf")
    if placement.prefill is not None:
        assert placement.prefill.role is Role.PREFILL
        assert not placement.prefill.draining
        assert placement.prefill.worker_id not in request.avoid
