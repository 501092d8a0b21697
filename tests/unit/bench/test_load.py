"""Which requests a load has, and when: arrivals, traces, prompts."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.arrivals import arrivals
from baton.bench.load import Prompts, Synthetic, cut, scaled, timed
from baton.bench.trace import TraceRow, kind_of, read_trace, sessions
from baton.config import BadSetting


class TestArrivals:
    def test_constant_ones_come_evenly(self) -> None:
        assert list(islice(arrivals("constant", 4.0, Random(0)), 3)) == [0.0, 0.25, 0.5]

    @pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
    def test_poisson_ones_come_at_the_rate_with_gaps_as_bursty_as_asked(self, burstiness: float) -> None:
        times = list(islice(arrivals("poisson", 10.0, Random(1), burstiness), 20_000))
        gaps = [later - earlier for earlier, later in pairwise(times)]
        mean = sum(gaps) / len(gaps)
        variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
        assert mean == pytest.approx(0.1, rel=0.05)
        assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.1)

    def test_the_same_seed_gives_the_same_times(self) -> None:
        first, second = (list(islice(arrivals("poisson", 3.0, Random(7)), 50)) for _ in range(2))
        assert first == second


class TestTraces:
    def test_mooncake_rows_with_one_time_stamp_are_spread_up_to_the_next(self, tmp_path: Path) -> None:
        path = tmp_path / "t.jsonl"
        line = {"input_length": 600, "output_length": 3, "hash_ids": [1, 2]}
        path.write_text("\n".join(json.dumps({"timestamp": stamp, **line}) for stamp in (1000, 1000, 4000)))
        assert [row.arrival_s for row in read_trace(path, kind_of(path))] == [0.0, 1.5, 3.0]

    def test_azure_rows_begin_at_zero(self, tmp_path: Path) -> None:
        path = tmp_path / "t.csv"
        path.write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:17:04.5000000,30,4\n2023-11-16 18:17:03.0000000,10,2\n"
        )
        assert read_trace(path, "azure") == [TraceRow(0.0, 10, 2), TraceRow(1.5, 30, 4)]

    def test_sharegpt_prompts_are_first_turns(self, tmp_path: Path) -> None:
        path = tmp_path / "t.json"
        turns = [{"from": "human", "value": "a" * 40}, {"from": "gpt", "value": "b" * 80}]
        path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
        assert read_trace(path, "sharegpt") == [TraceRow(0.0, 10, 20, text="a" * 40)]

    def test_a_file_of_another_kind_is_refused_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "t.jsonl"
        path.write_text("{}")
        with pytest.raises(BadSetting, match=r"t\.jsonl"):
            read_trace(path, "mooncake")

    def test_a_prompt_that_goes_on_from_another_is_of_its_session(self) -> None:
        rows = [TraceRow(0.0, 4 * len(ids), 1, ids, 4) for ids in ((1, 2), (1, 2, 3), (1, 4), (1, 2, 3, 5))]
        named = [name for _, name in sessions(rows)]
        assert named[0] == named[1] == named[3] != named[2]


BLOCKS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


class TestPrompts:
    @given(BLOCKS, BLOCKS, st.integers(1, 8))
    def test_share_as_many_leading_tokens_as_the_trace_says(
        self, one: list[int], other: list[int], size: int
    ) -> None:
        prompts = Prompts(seed=3)
        a, b = (
            prompts.request(TraceRow(0.0, size * len(ids), 1, ids, size), 0).prompt for ids in (one, other)
        )
        common = 0
        while common < min(len(one), len(other)) and one[common] == other[common]:
            common += 1
        assert a[: common * size] == b[: common * size]
        assert len(a) == size * len(one)

    @given(st.integers(1, 40), st.integers(1, 40))
    def test_without_block_ids_are_all_different(self, tokens: int, other: int) -> None:
        prompts = Prompts(seed=0)
        first = prompts.request(TraceRow(0.0, tokens + 3, 1), 0).prompt
        second = prompts.request(TraceRow(0.0, other + 3, 1), 1).prompt
        assert first[:4] != second[:4]

    def test_of_words_have_as_many_as_asked(self) -> None:
        prompt = Prompts(seed=0, words_per_token=0.5).request(TraceRow(0.0, 100, 1), 0).prompt
        assert isinstance(prompt, str)
        assert len(prompt.split()) == 50

    def test_of_a_common_prefix_begin_alike_and_go_on_differently(self) -> None:
        made = Synthetic(20, 5, prefix_tokens=8)
        rows = list(islice(made.rows(Random(0)), 2))
        prompts = Prompts(seed=0)
        a, b = (prompts.request(row, number).prompt for number, row in enumerate(rows))
        assert a[:8] == b[:8]
        assert a[8:] != b[8:]

    def test_scaling_keeps_what_is_shared(self) -> None:
        rows = [TraceRow(0.0, 1024, 10, (1, 2), 512), TraceRow(4.0, 1536, 10, (1, 2, 3), 512)]
        short = list(scaled(rows, 0.125, 2.0))
        prompts = Prompts(seed=0)
        a, b = (prompts.request(row, number).prompt for number, row in enumerate(short))
        assert (len(a), len(b), short[1].arrival_s) == (128, 192, 2.0)
        assert b[:128] == a


def test_a_load_ends_with_its_requests_or_its_time() -> None:
    endless = timed(Synthetic(4, 1).rows(Random(0)), "constant", 8.0, Random(0))
    assert len(cut(endless, 5, None)) == 5
    endless = timed(Synthetic(4, 1).rows(Random(0)), "constant", 8.0, Random(0))
    assert len(cut(endless, 50, 1.0)) == 8
