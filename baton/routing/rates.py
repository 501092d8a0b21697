"""How fast a worker reads, by where it reads from, learnt from read to read."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

_NEWEST_WEIGHT = 0.2
_MEANINGFUL_BYTES = 1024 * 1024
"""Of smaller reads the latency says more than the bandwidth."""

_NOTABLE = 0.1

Source = TypeVar("Source", bound=Hashable)


class ReadRates(Generic[Source]):
    """A moving average of bytes per second for each source. One thread notes, any may ask."""

    def __init__(self) -> None:
        self._rates: dict[Source, float] = {}

    def begin(self, source: Source, bytes_per_s: float) -> None:
        """What was measured before the first read that matters."""
        self._rates[source] = bytes_per_s

    def note(self, source: Source, read_bytes: int, seconds: float) -> None:
        """`read_bytes` came from `source` in `seconds`."""
        if read_bytes < _MEANINGFUL_BYTES or seconds <= 0:
            return
        newest = read_bytes / seconds
        known = self._rates.get(source, newest)
        self._rates[source] = known + _NEWEST_WEIGHT * (newest - known)

    def forget(self, source: Source) -> None:
        """The source is gone."""
        self._rates.pop(source, None)

    def now(self) -> dict[Source, float]:
        """Bytes per second of every source that was read from."""
        return dict(self._rates)


def notably_differ(told: dict[Source, float], now: dict[Source, float]) -> bool:
    """Whether rates have moved by more than a tenth, or have others beside them, since they were told."""
    return told.keys() != now.keys() or any(
        abs(now[source] - rate) > _NOTABLE * rate for source, rate in told.items()
    )
