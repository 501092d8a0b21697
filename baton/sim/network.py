"""Bytes between workers: every flow gets an equal share of the network cards at its two ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.sim.clock import Clock


@dataclass(eq=False, slots=True)
class Flow:
    """Bytes under way from one card to another; `turn` tells its current end from those it outlived."""

    source: Card
    target: Card
    left: float
    done: Callable[[], None]
    rate: float = 0.0
    since_s: float = 0.0
    turn: int = 0


@dataclass(eq=False, slots=True)
class Card:
    """A worker's network card: so many bytes per second each way. `sent` and `received` are totals."""

    bytes_per_s: float
    sending: dict[Flow, None] = field(default_factory=dict)
    receiving: dict[Flow, None] = field(default_factory=dict)
    sent: float = 0.0
    received: float = 0.0


class Network:
    """Carries flows. A flow is as fast as the scarcer of two equal shares, its source's and its target's.

    What one end cannot use of its share is not given to others: a little less than max-min fairness, and
    never more than a card can carry.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def send(self, source: Card, target: Card, size: float, done: Callable[[], None]) -> Flow:
        """Carry `size` bytes and call `done` when the last has arrived."""
        flow = Flow(source, target, size, done, since_s=self._clock.now_s)
        source.sending[flow] = target.receiving[flow] = None
        self._share(source, target)
        return flow

    def stop(self, flow: Flow) -> None:
        """Break a flow off; `done` is never called."""
        if flow in flow.source.sending:
            self._settle(flow)
            self._end(flow)

    def _share(self, source: Card, target: Card) -> None:
        """Set the rates of the flows that a change at the two cards touches."""
        for flow in source.sending | target.receiving:
            sender, receiver = flow.source, flow.target
            rate = min(
                sender.bytes_per_s / len(sender.sending), receiver.bytes_per_s / len(receiver.receiving)
            )
            if rate != flow.rate:
                self._settle(flow)
                flow.rate = rate
                flow.turn += 1
                self._clock.after(flow.left / rate, self._arrive, flow, flow.turn)

    def _settle(self, flow: Flow) -> None:
        """Take off what was carried since the rate was set."""
        now_s = self._clock.now_s
        carried = min(flow.left, flow.rate * (now_s - flow.since_s))
        flow.left -= carried
        flow.source.sent += carried
        flow.target.received += carried
        flow.since_s = now_s

    def _arrive(self, flow: Flow, turn: int) -> None:
        if turn != flow.turn or flow not in flow.source.sending:
            return
        self._settle(flow)
        flow.source.sent += flow.left
        flow.target.received += flow.left
        self._end(flow)
        flow.done()

    def _end(self, flow: Flow) -> None:
        del flow.source.sending[flow], flow.target.receiving[flow]
        self._share(flow.source, flow.target)
