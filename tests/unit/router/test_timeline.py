"""What is told of a choice's time, and of the latest choices together."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from baton.rpc.v1 import worker_pb2
from services.router.timeline import Recent, Targets, Timeline

TARGETS = Targets(ttft_s=0.5, tpot_s=0.05)


def timeline(
    *, slo: str = "interactive", ttft_s: float = 0.2, tokens: int = 11, tpot_s: float = 0.01
) -> Timeline:
    now_s = time.monotonic() - 10
    choice = Timeline("r-1", slo, 100, now_s, now_s + 0.01, queue_s=0.02)
    choice.placed_s = now_s + 0.031
    choice.first_s = now_s + ttft_s
    choice.last_s = choice.first_s + tpot_s * (tokens - 1)
    choice.output_tokens = tokens
    choice.outcome = "length"
    return choice


def test_phases_follow_each_other_and_chunks_end_with_the_first_token() -> None:
    choice = timeline()
    choice.prefill = worker_pb2.PrefillReport(queue_s=0.03, prefill_s=0.1)
    choice.prefill.chunks.add(tokens=64, seconds=0.06)
    choice.prefill.chunks.add(tokens=36, seconds=0.04)
    choice.transfer = worker_pb2.TransferReport(bytes=1, read_s=0.05, tail_s=0.01)
    phases = choice.phases()
    names = ["tokenize", "wait", "route", "send", "queue", "prefill", "prefill", "transfer", "decode"]
    assert [phase.name for phase in phases] == names
    assert all(phase.start_s <= phase.end_s for phase in phases)
    for before, after in pairwise(phases[:7]):
        assert after.start_s == pytest.approx(before.end_s)
    assert phases[6].end_s == pytest.approx(0.2)
    assert phases[7].start_s == pytest.approx(0.16)
    assert phases[8].start_s == pytest.approx(phases[7].end_s)


def test_reports_that_do_not_fit_the_routers_clock_stay_within_the_request() -> None:
    choice = timeline()
    choice.prefill = worker_pb2.PrefillReport(queue_s=9, prefill_s=9)
    choice.prefill.chunks.add(tokens=100, seconds=9)
    assert all(0 <= phase.start_s <= phase.end_s <= 0.31 for phase in choice.phases())


def test_a_choice_that_never_began_has_waited_only() -> None:
    choice = Timeline("r-1", "interactive", 100, 0.0, 0.01, queue_s=0.02)
    assert [phase.name for phase in choice.phases()] == ["tokenize", "wait"]
    assert choice.now().ttft_s is None


def test_good_is_what_keeps_both_targets_and_ends_well() -> None:
    assert TARGETS.met(timeline())
    assert not TARGETS.met(timeline(ttft_s=0.6))
    assert not TARGETS.met(timeline(tpot_s=0.06))
    assert TARGETS.met(timeline(slo="batch", ttft_s=5))
    broken = timeline()
    broken.outcome = "Unavailable"
    assert not TARGETS.met(broken)


def test_the_last_minute_in_percentiles_and_goodput() -> None:
    recent = Recent(TARGETS)
    assert recent.latency().ttft is None
    for number in range(1, 101):
        choice = timeline(ttft_s=number / 100)
        recent.begin(choice)
        recent.end(choice)
    latency = recent.latency()
    assert latency.ttft is not None
    assert (latency.ttft.p50, latency.ttft.p90) == (pytest.approx(0.51), pytest.approx(0.91))
    assert (recent.goodput()["interactive"].ended, recent.goodput()["interactive"].good) == (100, 50)
    assert not recent.running
    assert len(recent.find("r-1")) == 100


def test_what_flowed_is_forgotten_with_a_worker() -> None:
    recent = Recent(TARGETS)
    recent.moved("p", "d", 10)
    recent.moved("p", "d", 5)
    recent.moved("p", "e", 7)
    assert recent.flows == {("p", "d"): 15, ("p", "e"): 7}
    recent.forget("d")
    assert recent.flows == {("p", "e"): 7}
