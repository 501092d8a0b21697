"""What the replay of a workload finds, on an excerpt of a recorded one and on ones made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from baton.config import PolicyName
from baton.routing import Curve, Role
from baton.sim.replay import SimCluster, replay
from baton.sim.trace import BLOCK_TOKENS, TraceRequest, read_trace, single_cache_hit_rate

EXCERPT = Path(__file__).resolve().parents[2] / "data" / "mooncake_conversation_excerpt.jsonl"
CLUSTER = SimCluster(
    roles=(Role.HYBRID,) * 4,
    blocks_per_worker=2000,
    prefill_curve=Curve(((512.0, 0.02), (131072.0, 8.0))),
    decode_curve=Curve(((1.0, 0.02), (128.0, 0.05))),
    block_bytes=BLOCK_TOKENS * 160_000,
    read_bytes_per_s=12.5e9,
)
SPLIT = replace(CLUSTER, roles=(Role.PREFILL,) * 2 + (Role.DECODE,) * 2)


def excerpt() -> list[TraceRequest]:
    return read_trace(EXCERPT.read_text().splitlines())


def row(timestamp: int, ids: list[int], tokens: int | None = None, output: int = 1) -> str:
    tokens = len(ids) * BLOCK_TOKENS if tokens is None else tokens
    return json.dumps(
        {"timestamp": timestamp, "input_length": tokens, "output_length": output, "hash_ids": ids}
    )


class TestTrace:
    def test_blocks_that_a_prompt_fills_in_part_are_not_shared(self) -> None:
        (request,) = read_trace([row(0, [7, 8, 9], tokens=2 * BLOCK_TOKENS + 1)])
        assert len(request.chain) == 2

    def test_requests_with_one_time_stamp_are_spread_up_to_the_next(self) -> None:
        requests = read_trace([row(0, [1]), row(0, [2]), row(3000, [3])])
        assert [request.arrival_s for request in requests] == [0.0, 1.5, 3.0]

    def test_a_prompt_that_goes_on_from_another_is_of_its_session(self) -> None:
        lines = [row(0, [1, 2]), row(1, [1, 2, 3]), row(2, [1, 4]), row(3, [1, 2, 3, 5])]
        sessions = [request.session for request in read_trace(lines)]
        assert sessions[0] == sessions[1] == sessions[3] != sessions[2]

    def test_one_cache_that_holds_everything_hits_every_repeated_block(self) -> None:
        requests = read_trace([row(0, [1, 2]), row(1, [1, 2, 3, 4]), row(2, [5, 6])])
        assert single_cache_hit_rate(requests, 100) == pytest.approx(2 / 8)

    def test_one_cache_that_is_too_small_hits_less(self) -> None:
        requests = read_trace([row(0, [1, 2]), row(1, [3, 4]), row(2, [1, 2, 5])])
        assert single_cache_hit_rate(requests, 100) == pytest.approx(2 / 7)
        assert single_cache_hit_rate(requests, 3) < 2 / 7


class TestReplay:
    @pytest.mark.parametrize("policy", get_args(PolicyName))
    @pytest.mark.parametrize("cluster", [CLUSTER, SPLIT], ids=["hybrid", "split"])
    def test_every_request_gets_its_first_token(self, policy: str, cluster: SimCluster) -> None:
        requests = excerpt()[:100]
        result = replay(requests, policy, cluster)
        assert len(result.first_token_s) == len(requests)
        assert result.prompt_tokens == sum(request.prompt_tokens for request in requests)
        assert min(result.first_token_s) > 0

    def test_prefix_comes_near_one_cache_of_the_same_size_and_spreads_the_work(self) -> None:
        requests = excerpt()
        result = replay(requests, "prefix", CLUSTER)
        optimum = single_cache_hit_rate(requests, 4 * CLUSTER.blocks_per_worker)
        assert result.hit_rate > optimum - 0.01
        assert result.hit_rate > 1.25 * replay(requests, "least-loaded", CLUSTER).hit_rate
        assert result.imbalance < 1.2

    def test_separate_workers_do_not_keep_two_copies_for_long(self) -> None:
        requests = excerpt()
        small = replace(SPLIT, blocks_per_worker=1000)
        optimum = single_cache_hit_rate(requests, 4 * small.blocks_per_worker)
        assert replay(requests, "prefix", small).hit_rate > optimum - 0.03

    def test_two_routers_do_about_as_well_as_one(self) -> None:
        requests = excerpt()
        one = replay(requests, "prefix", CLUSTER)
        two = replay(requests, "prefix", replace(CLUSTER, routers=2))
        assert two.hit_rate == pytest.approx(one.hit_rate, abs=0.01)
        assert two.imbalance < 1.25

    def test_with_the_same_seed_it_ends_the_same(self) -> None:
        requests = excerpt()[:100]
        first, second = replay(requests, "prefix", SPLIT), replay(requests, "prefix", SPLIT)
        assert (first.hit_tokens, first.first_token_s) == (second.hit_tokens, second.first_token_s)

    def test_a_prefix_that_everybody_asks_for_is_pulled_when_its_holder_is_busy(self) -> None:
        shared = list(range(60))
        questions = [list(range(first, first + 10)) for first in range(100, 220, 10)]
        lines = [row(0, shared), *(row(20_000 + n, [*shared, *own]) for n, own in enumerate(questions))]
        pulling = replay(read_trace(lines), "prefix", CLUSTER)
        assert pulling.pulled_tokens > 0
        alone = replay(read_trace(lines), "prefix", replace(CLUSTER, read_bytes_per_s=1.0))
        assert alone.pulled_tokens == 0
        assert sum(pulling.first_token_s) < sum(alone.first_token_s)
