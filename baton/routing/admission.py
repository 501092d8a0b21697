"""Which waiting request starts next, and which one is told to come back: classes, tenants, deadlines.

Pure bookkeeping: the caller says what time it is, in seconds of any one clock, and how fast work goes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from baton.routing.view import Slo

Reason = Literal["queue_full", "displaced", "too_late"]

# Tenants that have gone are forgotten when so many more are remembered than wait.
_REMEMBERED = 64


@dataclass(frozen=True)
class Limits:
    """`places` are choices in flight, of which batch requests hold at most `batch_places`; `waiting` are
    requests queued per class, each for at most the `wait_s` of its class."""

    places: int
    batch_places: int
    waiting: int
    wait_s: Mapping[Slo, float]


@dataclass(frozen=True)
class Pace:
    """How fast the cluster works, as predicted now; 0 where nothing is known.

    `prefill_s` is seconds per prompt token on one of `prefillers` workers, `step_s` seconds per output
    token of a running request, `backlog_s` seconds until a worker takes another prompt.
    """

    prefill_s: float = 0.0
    prefillers: int = 1
    step_s: float = 0.0
    backlog_s: float = 0.0


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way in. Tokens are predicted, of all its choices together; after `deadline_s`
    it is of no use any more to begin."""

    tenant: str
    slo: Slo
    places: int
    prompt_tokens: int
    output_tokens: int
    arrived_s: float
    deadline_s: float
    started_s: float = 0.0

    @property
    def work(self) -> int:
        return max(1, self.prompt_tokens + self.output_tokens)


class Refused(Exception):
    """The request must come back later: in `retry_after_s`, when what is ahead of it is predicted done."""

    def __init__(self, reason: Reason, retry_after_s: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Admission:
    """Bounded queues, one per class, in front of a bounded number of places.

    Interactive requests go before batch ones. Within a class tenants share by weight: start-time fair
    queueing (Goyal, Vin, Cheng 1996) over predicted tokens, so that between two tenants that both wait,
    tokens started per weight never differ by more than one largest request of each. A full queue gives
    up the request that would start last, which is one of the greediest tenant.
    """

    def __init__(self, limits: Limits, weights: Mapping[str, float]) -> None:
        """`weights` are positive; a tenant that is not named has 1."""
        self._limits = limits
        self._queues: dict[Slo, _FairQueue] = {
            "interactive": _FairQueue(weights),
            "batch": _FairQueue(weights),
        }
        self._running: dict[Slo, _Running] = {"interactive": _Running(), "batch": _Running()}

    @property
    def running(self) -> int:
        """Places taken."""
        return sum(running.places for running in self._running.values())

    def waiting(self, slo: Slo) -> int:
        """Requests queued in the class."""
        return self._queues[slo].length

    def start(self, ticket: Ticket, now_s: float, *, room: bool) -> bool:
        """Start a request that just came, unless others go before it, all places are taken, or the
        workers have no `room`; whether it started."""
        others = any(queue.length for _, queue in self._not_after(ticket.slo))
        if others or not room or not self._fits(ticket):
            return False
        self._occupy(ticket, now_s)
        return True

    def wait(self, ticket: Ticket, now_s: float, pace: Pace) -> tuple[Ticket, Refused] | None:
        """Queue a request; the one that had to give way to it and what to tell it, if one had to.

        Raises:
            Refused: it would wait too long, or the queue is full of requests that start before it.
        """
        queue = self._queues[ticket.slo]
        ahead_s = self.predicted_wait_s(ticket, now_s, pace)
        if now_s + ahead_s > self.latest_start_s(ticket):
            raise Refused("too_late", ahead_s)
        victim = None
        if queue.length >= self._limits.waiting:
            last = queue.last()
            if last is None or queue.would_start(ticket) >= queue.starts(last):
                raise Refused("queue_full", ahead_s)
            victim = last, Refused("displaced", self.predicted_wait_s(last, now_s, pace))
            queue.remove(last)
        queue.add(ticket)
        return victim

    def latest_start_s(self, ticket: Ticket) -> float:
        """When it is too late for the request to start."""
        return min(ticket.arrived_s + self._limits.wait_s[ticket.slo], ticket.deadline_s)

    def next(self, now_s: float, *, room: bool) -> Ticket | None:
        """Start the request whose turn it is, if it fits; those whose time has passed are dropped."""
        for queue in self._queues.values():
            while (ticket := queue.first()) is not None and now_s > self.latest_start_s(ticket):
                queue.remove(ticket)
            if ticket is None:
                continue
            # Nothing overtakes the first, or requests for many places would never start.
            if not room or not self._fits(ticket):
                return None
            queue.start(ticket)
            self._occupy(ticket, now_s)
            return ticket
        return None

    def leave(self, ticket: Ticket) -> None:
        """The request stops waiting without having started."""
        self._queues[ticket.slo].remove(ticket)

    def finish(self, ticket: Ticket) -> None:
        """A started request is over."""
        self._running[ticket.slo].remove(ticket)

    def predicted_wait_s(self, ticket: Ticket, now_s: float, pace: Pace) -> float:
        """Seconds until the request would start: what runs now and what goes before it, on the places
        there are and through the prefill workers there are, whichever takes longer."""
        ahead = _Sums()
        for slo, queue in self._not_after(ticket.slo):
            before = queue.would_start(ticket) if slo == ticket.slo else None
            ahead.include(queue.ahead(before))
        through_prefill_s = pace.backlog_s + pace.prefill_s * ahead.prompt_tokens / max(1, pace.prefillers)
        waits = [through_prefill_s]
        if self.running + ahead.places + ticket.places > self._limits.places:
            remaining_s = sum(running.remaining_s(now_s, pace) for running in self._running.values())
            waits.append((remaining_s + ahead.place_seconds(pace)) / self._limits.places)
        batch = self._running["batch"]
        if ticket.slo == "batch" and batch.places + ahead.places + ticket.places > self._limits.batch_places:
            remaining_s = batch.remaining_s(now_s, pace)
            waits.append((remaining_s + ahead.place_seconds(pace)) / self._limits.batch_places)
        return max(waits)

    def _not_after(self, slo: Slo) -> Iterator[tuple[Slo, _FairQueue]]:
        """The classes that a request of class `slo` does not go before."""
        for each, queue in self._queues.items():
            if slo == "batch" or each == "interactive":
                yield each, queue

    def _fits(self, ticket: Ticket) -> bool:
        if self.running + ticket.places > self._limits.places:
            return False
        if ticket.slo == "interactive":
            return True
        # A batch request for more places than its class may hold starts when no other of it runs.
        wanted = min(ticket.places, self._limits.batch_places)
        return self._running["batch"].places + wanted <= self._limits.batch_places

    def _occupy(self, ticket: Ticket, now_s: float) -> None:
        ticket.started_s = now_s
        self._running[ticket.slo].add(ticket)


@dataclass(slots=True)
class _Sums:
    """Places and predicted tokens of several requests, some of them in part."""

    places: float = 0
    prompt_tokens: float = 0
    output_tokens: float = 0

    def add(self, ticket: Ticket, sign: int) -> None:
        self.places += sign * ticket.places
        self.prompt_tokens += sign * ticket.prompt_tokens
        self.output_tokens += sign * ticket.output_tokens

    def include(self, other: _Sums, share: float = 1.0) -> None:
        self.places += share * other.places
        self.prompt_tokens += share * other.prompt_tokens
        self.output_tokens += share * other.output_tokens

    def place_seconds(self, pace: Pace) -> float:
        """Seconds for which the requests hold their places, summed over the places."""
        return self.prompt_tokens * pace.prefill_s + self.output_tokens * pace.step_s


class _Running:
    """The requests of one class that have started."""

    def __init__(self) -> None:
        self.places = 0
        self._sums = _Sums()
        self._started_s = 0.0  # summed over the places

    def add(self, ticket: Ticket) -> None:
        self.places += ticket.places
        self._sums.add(ticket, 1)
        self._started_s += ticket.places * ticket.started_s

    def remove(self, ticket: Ticket) -> None:
        self.places -= ticket.places
        self._sums.add(ticket, -1)
        # Without the reset, rounding errors would add up for ever.
        self._started_s = self._started_s - ticket.places * ticket.started_s if self.places else 0.0

    def remaining_s(self, now_s: float, pace: Pace) -> float:
        """Seconds for which the places stay taken, summed over them."""
        return max(0.0, self._sums.place_seconds(pace) - (self.places * now_s - self._started_s))


class _Flow:
    """The waiting requests of one tenant, in order; `start_tag` is the virtual time of the first."""

    def __init__(self, start_tag: float, weight: float) -> None:
        self.start_tag = start_tag
        self.weight = weight
        self.tickets: deque[Ticket] = deque()
        self.sums = _Sums()
        self.work = 0

    @property
    def end_tag(self) -> float:
        return self.start_tag + self.work / self.weight


class _FairQueue:
    """Start-time fair queueing among the tenants of one class."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.length = 0
        self._weights = weights
        self._flows: dict[str, _Flow] = {}
        self._finish_tags: dict[str, float] = {}
        self._virtual = 0.0

    def add(self, ticket: Ticket) -> None:
        flow = self._flows.get(ticket.tenant)
        if flow is None:
            flow = _Flow(self.would_start(ticket), self._weights.get(ticket.tenant, 1.0))
            self._flows[ticket.tenant] = flow
        flow.tickets.append(ticket)
        flow.sums.add(ticket, 1)
        flow.work += ticket.work
        self.length += 1

    def first(self) -> Ticket | None:
        """The request whose turn it is."""
        if not self._flows:
            return None
        return min(self._flows.values(), key=lambda flow: flow.start_tag).tickets[0]

    def last(self) -> Ticket | None:
        """The request that would start last."""
        if not self._flows:
            return None
        latest = max(
            self._flows.values(), key=lambda flow: flow.end_tag - flow.tickets[-1].work / flow.weight
        )
        return latest.tickets[-1]

    def start(self, ticket: Ticket) -> None:
        """Take out the first request and charge its tenant."""
        flow = self._flows[ticket.tenant]
        self._virtual = flow.start_tag
        flow.start_tag += ticket.work / flow.weight
        self._finish_tags[ticket.tenant] = flow.start_tag
        self.remove(ticket)
        if len(self._finish_tags) > len(self._flows) + _REMEMBERED:
            still_ahead = {name: tag for name, tag in self._finish_tags.items() if tag > self._virtual}
            self._finish_tags = still_ahead

    def remove(self, ticket: Ticket) -> None:
        """Take out a request without charge; nothing happens when it is not here."""
        flow = self._flows.get(ticket.tenant)
        if flow is None or ticket not in flow.tickets:
            return
        flow.tickets.remove(ticket)
        flow.sums.add(ticket, -1)
        flow.work -= ticket.work
        self.length -= 1
        if not flow.tickets:
            del self._flows[ticket.tenant]
        if not self.length:
            # While nobody waits nobody is wronged: everybody begins anew.
            self._finish_tags.clear()
            self._virtual = 0.0

    def would_start(self, ticket: Ticket) -> float:
        """Virtual time at which the request starts if it comes now, or at which it does if it is here."""
        flow = self._flows.get(ticket.tenant)
        if flow is None:
            return max(self._virtual, self._finish_tags.get(ticket.tenant, 0.0))
        if ticket in flow.tickets:
            return self.starts(ticket)
        return flow.end_tag

    def starts(self, ticket: Ticket) -> float:
        """Virtual time at which a request that waits here starts."""
        flow = self._flows[ticket.tenant]
        at = flow.start_tag
        for earlier in flow.tickets:
            if earlier is ticket:
                break
            at += earlier.work / flow.weight
        return at

    def ahead(self, before: float | None) -> _Sums:
        """What starts before the virtual time `before` (None: everything), a flow's last request in part."""
        sums = _Sums()
        for flow in self._flows.values():
            work = flow.work if before is None else (before - flow.start_tag) * flow.weight
            sums.include(flow.sums, max(0.0, min(1.0, work / flow.work)))
        return sums
