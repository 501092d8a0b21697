"""The figures of a run: latency percentiles, throughput, goodput, cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from math import ceil, inf, isfinite

import msgspec

from baton.bench.records import Records, RequestRecord


class Targets(msgspec.Struct, frozen=True):
    """What a request must meet to count as good: seconds, None where nothing is asked."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        """Whether the request ended well and met every target (DistServe, OSDI 2024)."""
        return (
            not record.error
            and (self.ttft_s is None or record.ttft_s <= self.ttft_s)
            and (self.tpot_s is None or record.tpot_s <= self.tpot_s)
        )


class Latency(msgspec.Struct, frozen=True):
    """Seconds. None, for a percentile or the longest, is that of a failed request: infinite. The mean is over
    the requests that did not fail."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    longest: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run in figures. Failed requests count as infinitely late in every percentile.

    `duration_s` is from the first request due to the last token. `itl` is over all gaps between tokens of
    all requests, `tpot` over requests' means, `tbt` over requests' longest tenths (Mooncake). `lateness` is
    by how much the client sent requests after they were due. Latencies of nothing are None; `goodput_per_s`
    and `attainment` are None without targets, costs without a price.
    """

    requests: int
    failed: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft: Latency | None
    tpot: Latency | None
    itl: Latency | None
    tbt: Latency | None
    e2e: Latency | None
    lateness: Latency | None
    targets: Targets
    attainment: float | None
    goodput_per_s: float | None
    cost_per_1m_output_tokens: float | None
    cost_per_1m_tokens: float | None


def summarize(
    records: Records,
    targets: Targets | None = None,
    price_per_hour: float | None = None,
) -> Summary:
    """The figures of `records`; `price_per_hour` is of everything that served them together."""
    targets = targets or Targets()
    errors: dict[str, int] = {}
    ttft, tpot, tbt, e2e, late = [], [], [], [], []
    good = inputs = outputs = cached = 0
    begin_s, end_s = inf, 0.0
    for record in records:
        begin_s = min(begin_s, record.scheduled_s)
        ttft.append(record.ttft_s)
        e2e.append(record.e2e_s)
        late.append(record.sent_s - record.scheduled_s)
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
        if record.error or record.output_tokens > 1:
            tpot.append(record.tpot_s)
            tbt.append(inf if record.error else record.tbt_s)
        end_s = max(end_s, record.sent_s, record.end_s if isfinite(record.end_s) else 0.0)
        if record.output_tokens:
            inputs += record.input_tokens
            outputs += record.output_tokens
            cached += record.cached_tokens
        good += targets.met_by(record)
    duration_s = max(end_s - begin_s, 1e-9) if len(records) else 0.0
    failures = sum(errors.values())
    asked = targets.ttft_s is not None or targets.tpot_s is not None
    spent = None if price_per_hour is None else price_per_hour * duration_s / 3600
    return Summary(
        requests=len(records),
        failed=failures,
        errors=errors,
        duration_s=duration_s,
        requests_per_s=_per(len(records) - failures, duration_s),
        input_tokens=inputs,
        output_tokens=outputs,
        cached_tokens=cached,
        input_tokens_per_s=_per(inputs, duration_s),
        output_tokens_per_s=_per(outputs, duration_s),
        ttft=latency(ttft),
        tpot=latency(tpot),
        itl=_latency(records.gaps.ordered()),
        tbt=latency(tbt),
        e2e=latency(e2e),
        lateness=latency(late),
        targets=targets,
        attainment=good / len(records) if asked and len(records) else None,
        goodput_per_s=_per(good, duration_s) if asked else None,
        cost_per_1m_output_tokens=_cost(spent, outputs),
        cost_per_1m_tokens=_cost(spent, inputs + outputs),
    )


def latency(seconds: Iterable[float]) -> Latency | None:
    """Percentiles by nearest rank; None without values."""
    return _latency((value, 1) for value in sorted(seconds))


def _latency(ordered: Iterable[tuple[float, int]]) -> Latency | None:
    values, counts = [], []
    for value, count in ordered:
        values.append(value)
        counts.append(count)
    if not values:
        return None
    ranks = list(accumulate(counts))
    finite = [(value, count) for value, count in zip(values, counts, strict=True) if isfinite(value)]
    told = sum(count for _, count in finite)
    mean = sum(value * count for value, count in finite) / told if told else None

    def at(percentile: int) -> float | None:
        value = values[bisect_left(ranks, ceil(percentile / 100 * ranks[-1]))]
        return value if isfinite(value) else None

    return Latency(mean, at(50), at(90), at(95), at(99), at(100))


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _cost(spent: float | None, tokens: int) -> float | None:
    return None if spent is None or not tokens else spent / tokens * 1e6
