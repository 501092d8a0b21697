"""What is asked of a simulated cluster: requests whose prompts are known by the ids of their blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import overload

from baton.bench.trace import TraceRow, sessions
from baton.routing.view import Slo

_ID = Struct("<QQ").pack
_OWN = 1 << 62
_PLACE = 36


class BlockIds(Sequence[bytes]):
    """The ids of a prompt's `count` blocks of `size` tokens, made when they are asked for.

    Args:
        ids: of the trace's blocks of `trace_size` tokens; equal ones stand for equal tokens and equal
            tokens before. A block is named by the trace's block that it ends in, and where in it. Those
            that end in a negative one, or past the last, belong to request `number` alone.
    """

    __slots__ = ("_count", "_ids", "_number", "_size", "_trace_size")

    def __init__(self, ids: Sequence[int], trace_size: int, size: int, count: int, number: int) -> None:
        self._ids = ids
        self._trace_size = trace_size
        self._size = size
        self._count = count
        self._number = number

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> bytes: ...

    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...

    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        if isinstance(at, slice):
            return [self._name(index) for index in range(self._count)[at]]
        return self._name(range(self._count)[at])

    def span(self, first: int, end: int) -> list[bytes]:
        """Some of the ids, past the last one too: those are what the request itself generates."""
        return [self._name(index) for index in range(first, end)]

    def _name(self, index: int) -> bytes:
        # Replicas of the index know blocks by the last eight bytes, and spread them by the lowest of those.
        if index < self._count and self._ids:
            end = (index + 1) * self._size
            at = min((end - 1) // self._trace_size, len(self._ids) - 1)
            if (block := self._ids[at]) >= 0:
                return _ID(0, (end - at * self._trace_size) << _PLACE | block)
        return _ID(0, _OWN | index << _PLACE | self._number)


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request. `chain` names its full prompt blocks; `session` its conversation, if it has one."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    chain: BlockIds
    session: str = ""
    slo: Slo = "interactive"
    tenant: str = ""


def from_trace(rows: Iterable[TraceRow], block_tokens: int) -> Iterator[SimRequest]:
    """The requests of a trace on workers with blocks of `block_tokens`."""
    for number, (row, session) in enumerate(sessions(rows)):
        full = row.input_tokens // block_tokens
        yield SimRequest(
            row.arrival_s,
            row.input_tokens,
            row.output_tokens,
            BlockIds(row.block_ids, row.block_tokens, block_tokens, full, number),
            session,
        )
