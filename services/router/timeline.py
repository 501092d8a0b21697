"""When what happened to a choice, and what that says of the latest ones: for metrics, the page and traces."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton import tracing
from baton.cluster_now import ChoiceNow, Goodput, Latency, Percentiles, Phase
from baton.rpc.v1 import worker_pb2

_KEPT = 2048
_WINDOW_S = 60.0


@dataclass(slots=True, eq=False)
class Timeline:
    """One choice. Times are `time.monotonic()`, 0 until they have come; workers are those of the placement
    that gave the first token.

    `queue_s` was spent waiting to be let in; `trace` is its traceparent, if it is traced. `prefill` is what
    the worker that computed the prompt said, and `transfer` what the one that read its KV did. `outcome` is
    empty while it runs, then the finish reason, or the error's name.
    """

    request_id: str
    slo: str
    prompt_tokens: int
    arrived_s: float
    tokenized_s: float
    queue_s: float
    trace: str = ""
    placed_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    ended_s: float = 0.0
    placements: int = 0
    predicted_s: float = 0.0
    decode_worker: str = ""
    computing_worker: str = ""
    pull_worker: str = ""
    kind: str = ""
    prefill: worker_pb2.PrefillReport | None = None
    transfer: worker_pb2.TransferReport | None = None
    output_tokens: int = 0
    outcome: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first; 0 where there is none."""
        return (self.last_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    def record(self) -> None:
        """Trace what the router did; workers trace what they did themselves."""
        if not self.trace:
            return
        tracing.record(self.trace, "tokenize", self.arrived_s, self.tokenized_s)
        admitted_s = self.tokenized_s + self.queue_s
        tracing.record(self.trace, "wait", self.tokenized_s, admitted_s)
        if self.placed_s:
            workers: tracing.Attributes = {"decode": self.decode_worker, "computing": self.computing_worker}
            predicted: tracing.Attributes = {"predicted_s": self.predicted_s, "placements": self.placements}
            tracing.record(self.trace, "place", admitted_s, self.placed_s, {**workers, **predicted})
        if self.first_s:
            tokens: tracing.Attributes = {"tokens": self.output_tokens, "outcome": self.outcome}
            tracing.record(self.trace, "stream", self.first_s, self.last_s, tokens)

    def now(self) -> ChoiceNow:
        """What is known of it, for the page."""
        return ChoiceNow(
            request_id=self.request_id,
            slo=self.slo,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.prefill.cached_tokens if self.prefill is not None else 0,
            output_tokens=self.output_tokens,
            outcome=self.outcome,
            prefill=self.kind,
            decode_worker=self.decode_worker,
            computing_worker=self.computing_worker,
            pull_worker=self.pull_worker,
            placements=self.placements,
            predicted_s=self.predicted_s,
            ttft_s=self.ttft_s if self.first_s else None,
            tpot_s=self.tpot_s if self.output_tokens > 1 else None,
            phases=self.phases(),
        )

    def phases(self) -> list[Phase]:
        """What took the time, in order of start.

        What workers report is laid before the first token, which ended it: they tell durations alone. The
        rest of that time is `send`, the way there and back.
        """
        tokenized = self.tokenized_s - self.arrived_s
        admitted = tokenized + self.queue_s
        found = [Phase("tokenize", 0.0, tokenized), Phase("wait", tokenized, admitted)]
        if not self.placed_s:
            return found
        placed = self.placed_s - self.arrived_s
        found.append(Phase("route", admitted, placed))
        if not self.first_s:
            return found
        first, last = self.ttft_s, self.last_s - self.arrived_s
        report = self.prefill
        if report is not None:
            began = max(placed, first - report.prefill_s)
            queued = max(placed, began - report.queue_s)
            found += [Phase("send", placed, queued), Phase("queue", queued, began)]
            for chunk in report.chunks:
                ended = min(first, began + chunk.seconds)
                found.append(Phase("prefill", began, ended))
                began = ended
        if self.transfer is not None:
            landed = first + self.transfer.tail_s
            found.append(Phase("transfer", max(placed, landed - self.transfer.read_s), landed))
            first = landed
        if last > first:
            found.append(Phase("decode", first, last))
        return found


@dataclass(frozen=True)
class Targets:
    """What a choice must keep to count as good: the `slo` class `batch` has only to end well."""

    ttft_s: float
    tpot_s: float

    def met(self, timeline: Timeline) -> bool:
        if timeline.outcome not in ("stop", "length"):
            return False
        if timeline.slo == "batch":
            return True
        return timeline.ttft_s <= self.ttft_s and timeline.tpot_s <= self.tpot_s


@dataclass
class Recent:
    """The choices that run and the last that ended; one per router. Costs a few appends per choice."""

    targets: Targets
    running: dict[Timeline, None] = field(default_factory=dict)
    ended: deque[Timeline] = field(default_factory=lambda: deque(maxlen=_KEPT))
    flows: Counter[tuple[str, str]] = field(default_factory=Counter)
    output_tokens: int = 0
    prompt_tokens: int = 0

    def begin(self, timeline: Timeline) -> None:
        self.running[timeline] = None

    def end(self, timeline: Timeline) -> None:
        timeline.ended_s = time.monotonic()
        del self.running[timeline]
        self.ended.append(timeline)

    def moved(self, source: str, target: str, size: int) -> None:
        """`target` has read KV of `source`."""
        self.flows[source, target] += size

    def forget(self, worker_id: str) -> None:
        """The worker is gone, and with it what flowed to and from it."""
        for pair in [pair for pair in self.flows if worker_id in pair]:
            del self.flows[pair]

    def find(self, request_id: str) -> list[Timeline]:
        """The choices of a request, oldest first; empty when it is not among those kept."""
        return [each for each in (*self.ended, *self.running) if each.request_id == request_id]

    def latency(self) -> Latency:
        """Percentiles of the last minute."""
        ended = self._lately()
        begun = [each for each in (*ended, *self.running) if each.first_s]
        return Latency(
            ttft=_percentiles(each.ttft_s for each in begun),
            tpot=_percentiles(each.tpot_s for each in begun if each.output_tokens > 1),
            e2e=_percentiles(each.ended_s - each.arrived_s for each in ended if each.first_s),
        )

    def goodput(self) -> dict[str, Goodput]:
        """Of the last minute, by class."""
        by_class: dict[str, list[bool]] = {}
        for each in self._lately():
            by_class.setdefault(each.slo, []).append(self.targets.met(each))
        return {slo: Goodput(ended=len(met), good=sum(met)) for slo, met in by_class.items()}

    def _lately(self) -> Sequence[Timeline]:
        since_s = time.monotonic() - _WINDOW_S
        return [each for each in self.ended if each.ended_s >= since_s]


def _percentiles(values: Iterable[float]) -> Percentiles | None:
    ordered = sorted(values)
    if not ordered:
        return None
    last = len(ordered) - 1
    return Percentiles(*(ordered[min(last, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99)))
