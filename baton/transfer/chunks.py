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
    range.
    """
    order = np.argsort(np.asarray(source_blocks, dtype=np.int64), kind="stable")
    sources = np.asarray(source_blocks, dtype=np.int64)[order]
    destinations = np.asarray(destination_blocks, dtype=np.int64)[order]
    blocks_per_chunk = max(1, CHUNK_BYTES // block_bytes)
    return [
        _chunk(
            sources[at : at + blocks_per_chunk],
            destinations[at : at + blocks_per_chunk],
            block_bytes,
            source,
            destination,
        )
        for at in range(0, len(sources), blocks_per_chunk)
    ]


def _chunk(
    sources: npt.NDArray[np.int64],
    destinations: npt.NDArray[np.int64],
    block_bytes: int,
    source: Side,
    destination: Side,
) -> Chunk:
    broken = (np.diff(sources) != 1) | (np.diff(destinations) != 1)
    starts = np.concatenate(([0], np.flatnonzero(broken) + 1))
    blocks = np.diff(np.append(starts, len(sources)))
    return Chunk(
        source=_ranges(sources[starts], blocks, block_bytes, source),
        source_memory=source.memory_type,
        destination=_ranges(destinations[starts], blocks, block_bytes, destination),
        destination_memory=destination.memory_type,
        bytes=len(sources) * block_bytes,
    )


def _ranges(
    first_blocks: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64], block_bytes: int, side: Side
) -> npt.NDArray[np.uint64]:
    ranges = np.empty((len(first_blocks), 3), dtype=np.uint64)
    ranges[:, 0] = np.uint64(side.address) + first_blocks.astype(np.uint64) * np.uint64(block_bytes)
    ranges[:, 1] = blocks.astype(np.uint64) * np.uint64(block_bytes)
    ranges[:, 2] = side.device_id
    return ranges
