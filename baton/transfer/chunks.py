"""Which byte ranges a read of blocks becomes: few, large, and in pieces that end soon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.transfer.base import MemoryType, Side

CHUNK_BYTES = 64 * 1024 * 1024
"""Bytes asked for at once. What is asked for cannot be taken back, so this bounds how long a cancelled read
lingers (70 ms at TCP's 1 GB/s) and how long one read keeps others waiting; smaller gains nothing."""

Ranges = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Chunk:
    """Range i of `source` is copied to range i of `destination`.

    Both are uint64 [ranges, 3]: address, length in bytes, device id.
    """

    source: npt.NDArray[np.uint64]
    source_memory: MemoryType
    destination: npt.NDArray[np.uint64]
    destination_memory: MemoryType
    bytes: int


def chunks_of(
    source_blocks: Sequence[int],
    destination_blocks: Sequence[int],
    block_bytes: int,
    source: Side,
    destination: Side,
) -> list[Chunk]:
    """Chunks that together copy every pair of blocks once.

    Pairs are taken in order of their source, and neighbours that are neighbours on both sides become one
    range. Most reads are of few blocks, where a loop is faster than array operations.
    """
    pairs = sorted(zip(source_blocks, destination_blocks, strict=True))
    blocks_per_chunk = max(1, CHUNK_BYTES // block_bytes)
    return [
        _chunk(pairs[at : at + blocks_per_chunk], block_bytes, source, destination)
        for at in range(0, len(pairs), blocks_per_chunk)
    ]


def _chunk(pairs: Sequence[tuple[int, int]], block_bytes: int, source: Side, destination: Side) -> Chunk:
    here: Ranges = []
    there: Ranges = []
    first = last = pairs[0]
    for pair in pairs[1:]:
        if pair[0] != last[0] + 1 or pair[1] != last[1] + 1:
            _add(there, source, first[0], last[0], block_bytes)
            _add(here, destination, first[1], last[1], block_bytes)
            first = pair
        last = pair
    _add(there, source, first[0], last[0], block_bytes)
    _add(here, destination, first[1], last[1], block_bytes)
    return Chunk(
        source=np.array(there, dtype=np.uint64),
        source_memory=source.memory_type,
        destination=np.array(here, dtype=np.uint64),
        destination_memory=destination.memory_type,
        bytes=len(pairs) * block_bytes,
    )


def _add(ranges: Ranges, side: Side, first: int, last: int, block_bytes: int) -> None:
    """Append the range of the blocks `first` to `last`."""
    ranges.append((side.address + first * block_bytes, (last - first + 1) * block_bytes, side.device_id))
