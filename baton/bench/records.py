"""What came of each request, kept in columns, and all gaps between tokens as a histogram."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil, exp, inf, log, nan

_BIN = log(1.002)
_SHORTEST_S = 1e-6


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request; all times are seconds since the run began.

    It was to be sent at `scheduled_s` and was at `sent_s`; its first token came at `first_s`, its last at
    `end_s`, both nan when none came. `cached_tokens` of the prompt were not computed, as far as is known.
    `tbt_s` is Mooncake's time between tokens, see `mooncake_tbt_s`. `error` says in a word or two why the
    request failed, empty when it did not.
    """

    scheduled_s: float
    sent_s: float
    first_s: float
    end_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    tbt_s: float = 0.0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token, from when the request was due; infinite when none came."""
        return self.first_s - self.scheduled_s if self.first_s == self.first_s else inf

    @property
    def e2e_s(self) -> float:
        """Time to the last token; infinite for a failed request."""
        return inf if self.error else self.end_s - self.scheduled_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; infinite for a failed request, 0 with one token."""
        if self.error:
            return inf
        if self.output_tokens < 2:
            return 0.0
        return (self.end_s - self.first_s) / (self.output_tokens - 1)


@dataclass
class Gaps:
    """A histogram of gaps between tokens, in bins of 0.2 %: millions of them in a few kilobytes."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, gap_s: float, times: int = 1) -> None:
        """Count a gap of so many seconds."""
        self.counts[round(log(gap_s if gap_s > _SHORTEST_S else _SHORTEST_S) / _BIN)] += times

    def ordered(self) -> Iterator[tuple[float, int]]:
        """(seconds, how often), ascending."""
        for number in sorted(self.counts):
            yield exp(number * _BIN), self.counts[number]


class Records:
    """The requests of one run, in the order in which they were appended; 72 bytes each."""

    def __init__(self, records: Iterable[RequestRecord] = ()) -> None:
        self.gaps = Gaps()
        self._times = [array("d") for _ in range(5)]
        self._tokens = [array("q") for _ in range(3)]
        self._errors: dict[int, str] = {}
        for record in records:
            self.append(record)

    def append(self, record: RequestRecord) -> None:
        """Take one more request."""
        if record.error:
            self._errors[len(self)] = record.error
        times = (record.scheduled_s, record.sent_s, record.first_s, record.end_s, record.tbt_s)
        for times_column, seconds in zip(self._times, times, strict=True):
            times_column.append(seconds)
        tokens = (record.input_tokens, record.output_tokens, record.cached_tokens)
        for tokens_column, count in zip(self._tokens, tokens, strict=True):
            tokens_column.append(count)

    @property
    def errors(self) -> Counter[str]:
        """How many requests failed, by reason."""
        return Counter(self._errors.values())

    def __len__(self) -> int:
        return len(self._times[0])

    def __iter__(self) -> Iterator[RequestRecord]:
        return (self._row(index) for index in range(len(self)))

    def _row(self, at: int) -> RequestRecord:
        scheduled_s, sent_s, first_s, end_s, tbt_s = (column[at] for column in self._times)
        inputs, outputs, cached = (column[at] for column in self._tokens)
        error = self._errors.get(at, "")
        return RequestRecord(scheduled_s, sent_s, first_s, end_s, inputs, outputs, cached, tbt_s, error)


def mooncake_tbt_s(gaps: Iterable[tuple[float, int]]) -> float:
    """A request's time between tokens as Mooncake has it: the mean of the longest tenth of its gaps.

    `gaps` are (seconds, how often) in any order; 0 without any. The tenth is rounded up.
    Source: Qin et al., Mooncake (FAST 2025), section 2.
    """
    ordered = sorted(gaps, reverse=True)
    wanted = left = ceil(sum(times for _, times in ordered) / 10)
    total_s = 0.0
    for gap_s, times in ordered:
        taken = min(times, left)
        total_s += taken * gap_s
        left -= taken
        if not left:
            break
    return total_s / wanted if wanted else 0.0


def failed(scheduled_s: float, sent_s: float, input_tokens: int, error: str) -> RequestRecord:
    """The record of a request that never got a token."""
    return RequestRecord(scheduled_s, sent_s, nan, nan, input_tokens, 0, error=error)
