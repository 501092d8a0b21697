"""Percentiles, goodput and the other figures of a run, from records made up here."""

from __future__ import annotations

from math import ceil, inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.records import Gaps, Records, RequestRecord, failed, mooncake_tbt_s
from baton.bench.result import Result, load, run_of, save, side_by_side
from baton.bench.summary import Targets, latency, summarize
from baton.bench.table import rows
from baton.config import BadSetting


def record(ttft_s: float = 0.1, tpot_s: float = 0.01, tokens: int = 11, due_s: float = 0.0) -> RequestRecord:
    first_s = due_s + ttft_s
    return RequestRecord(due_s, due_s, first_s, first_s + tpot_s * (tokens - 1), 100, tokens)


class TestPercentiles:
    @given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([50, 90, 95, 99]))
    def test_are_values_that_so_many_do_not_exceed(self, seconds: list[float], percentile: int) -> None:
        found = latency(seconds)
        assert found is not None
        value = getattr(found, f"p{percentile}")
        assert value == sorted(seconds)[ceil(percentile / 100 * len(seconds)) - 1]

    def test_of_nothing_are_not_made_up(self) -> None:
        assert latency([]) is None

    def test_a_failed_request_counts_as_infinitely_late(self) -> None:
        found = latency([0.1] * 9 + [inf])
        assert found is not None
        assert (found.p90, found.p95, found.longest, found.mean) == (0.1, None, None, pytest.approx(0.1))

    def test_gaps_keep_their_length_within_a_thousandth(self) -> None:
        gaps = Gaps()
        gaps.add(0.0123, 5)
        [(seconds, times)] = gaps.ordered()
        assert seconds == pytest.approx(0.0123, rel=1e-3)
        assert times == 5


class TestSummary:
    def test_goodput_counts_requests_that_meet_both_targets(self) -> None:
        records = Records([record(), record(ttft_s=0.3), record(tpot_s=0.2), failed(0.0, 0.0, 5, "HTTP 500")])
        summary = summarize(records, Targets(0.2, 0.1))
        assert summary.attainment == 0.25
        assert summary.goodput_per_s == pytest.approx(1 / summary.duration_s)

    def test_failed_requests_are_counted_with_their_reasons(self) -> None:
        records = Records([record(), failed(0.0, 0.0, 5, "HTTP 500"), failed(0.0, 0.0, 5, "timeout")])
        summary = summarize(records)
        assert (summary.failed, summary.errors) == (2, {"HTTP 500": 1, "timeout": 1})
        assert summary.ttft is not None
        assert summary.ttft.p90 is None

    def test_latency_counts_from_when_the_request_was_due(self) -> None:
        late = RequestRecord(1.0, 3.0, 4.0, 4.0, 10, 1)
        summary = summarize(Records([late]))
        assert summary.ttft is not None
        assert summary.lateness is not None
        assert (summary.ttft.p50, summary.lateness.p50) == (3.0, 2.0)

    def test_cost_is_price_over_tokens(self) -> None:
        summary = summarize(Records([record(tokens=11)]), price_per_hour=3600.0)
        assert summary.cost_per_1m_output_tokens == pytest.approx(1e6 * summary.duration_s / 11)

    def test_a_run_without_requests_has_no_rates(self) -> None:
        assert summarize(Records()).requests_per_s == 0.0


class TestMooncakeTbt:
    def test_is_the_mean_of_the_longest_tenth(self) -> None:
        assert mooncake_tbt_s([(0.01, 18), (0.5, 1), (0.3, 1)]) == pytest.approx(0.4)

    def test_of_few_gaps_is_the_longest(self) -> None:
        assert mooncake_tbt_s([(0.01, 1), (0.02, 1)]) == 0.02

    @given(st.lists(st.tuples(st.floats(1e-6, 10), st.integers(1, 20)), min_size=1))
    def test_lies_between_the_mean_and_the_longest(self, gaps: list[tuple[float, int]]) -> None:
        mean = sum(gap * times for gap, times in gaps) / sum(times for _, times in gaps)
        assert mean * (1 - 1e-9) <= mooncake_tbt_s(gaps) <= max(gap for gap, _ in gaps) * (1 + 1e-9)


class TestResult:
    def test_comes_back_from_its_file_with_failures_in_it(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        records = Records([record(), failed(0.0, 0.0, 5, "timeout")])
        run = run_of("one", "made up", 2.0, records, summarize(records))
        save(Result("bench", "now", {}, {}, [run]), path)
        assert load(path).runs == [run]

    def test_two_stand_side_by_side_under_their_names(self) -> None:
        records = Records([record()])
        result = Result("bench", "now", {}, {}, [run_of("x", "l", None, records, summarize(records))])
        both = side_by_side({"a": result, "b": result})
        assert [run.label for run in both.runs] == ["a", "b"]
        assert dict(rows(both.runs))["requests"] == ["1", "1"]

    def test_another_file_is_refused_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "other.json"
        path.write_text("{}")
        with pytest.raises(BadSetting, match=r"other\.json"):
            load(path)
