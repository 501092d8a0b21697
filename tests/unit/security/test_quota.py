"""Rates hold over time, whatever the requests look like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.security.quota import Quota, RateLimited

PER_MINUTE = 120


@given(st.lists(st.floats(0, 90), min_size=1, max_size=300))
def test_no_stretch_of_time_lets_in_more_than_a_minutes_worth_and_its_rate(pauses: list[float]) -> None:
    quota = Quota(PER_MINUTE, 0, 0.0)
    now_s, let_in = 0.0, []
    for pause in pauses:
        now_s += pause / 30
        try:
            quota.take_request(now_s)
        except RateLimited as refused:
            assert refused.retry_after_s > 0
        else:
            let_in.append(now_s)
    for at, began_s in enumerate(let_in):
        for until, ended_s in enumerate(let_in[at:], start=1):
            assert until <= PER_MINUTE + (ended_s - began_s) * PER_MINUTE / 60 + 1e-6


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=50))
def test_what_is_taken_beyond_the_rate_is_owed(takes: list[int]) -> None:
    quota = Quota(0, PER_MINUTE, 0.0)
    now_s = taken = 0.0
    for tokens in takes:
        try:
            quota.require_tokens(now_s)
        except RateLimited as refused:
            # Coming back when told is soon enough, and no sooner is.
            with pytest.raises(RateLimited):
                quota.require_tokens(now_s + refused.retry_after_s * 0.99 - 1e-6)
            now_s += refused.retry_after_s + 1e-6
            quota.require_tokens(now_s)
        quota.take_tokens(tokens)
        taken += tokens
        assert taken - tokens <= PER_MINUTE + now_s * PER_MINUTE / 60


def test_a_limit_of_nothing_is_none() -> None:
    quota = Quota(0, 0, 0.0)
    assert not quota.counts_tokens
    for _ in range(1000):
        quota.take_request(0.0)
        quota.require_tokens(0.0)
        quota.take_tokens(10**9)
