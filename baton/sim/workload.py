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


class BlockIds(Sequence[bytes]):
    """The ids of `count` blocks, made when they are asked for.

    The blocks are those of a trace cut into `parts` equal ones: trace block 7 in 32 parts is blocks 7/0 to
    7/31. Blocks beyond the trace's, all of them in a trace without ids, belong to request `number` alone.
    """

    __slots__ = ("_count", "_ids", "_number", "_parts")

    def __init__(self, ids: Sequence[int], parts: int, count: int, number: int) -> None:
        self._ids = ids
        self._parts = parts
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
        part = index // self._parts
        if part < len(self._ids):
            return _ID(0, self._ids[part] * self._parts + index % self._parts)
        # Replicas of the index know blocks by the last eight bytes: nothing else may be in the first.
        return _ID(0, _OWN | self._number << 24 | index)


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
    """The requests of a trace on workers with blocks of `block_tokens`.

    Raises:
        ValueError: the trace's own blocks do not divide into such blocks.
    """
    for number, (row, session) in enumerate(sessions(rows)):
        if row.block_ids and row.block_tokens % block_tokens:
            raise ValueError(
                f"blocks of {row.block_tokens} tokens do not divide into blocks of {block_tokens}"
            )
        parts = max(1, row.block_tokens // block_tokens)
        full = row.input_tokens // block_tokens
        yield SimRequest(
            row.arrival_s,
            row.input_tokens,
            row.output_tokens,
            BlockIds(row.block_ids, parts, full, number),
            session,
        )
