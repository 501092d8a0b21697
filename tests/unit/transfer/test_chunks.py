"""A read of blocks becomes few large ranges that copy every pair exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.transfer import chunks as module
from baton.transfer.base import Side
from baton.transfer.chunks import Chunk, chunks_of

SOURCE = Side(address=1 << 46, device_id=3, memory_type="VRAM")
DESTINATION = Side(address=1 << 40, device_id=0, memory_type="DRAM")
BLOCK_BYTES = 4096

pairs = st.dictionaries(st.integers(0, 300), st.integers(0, 300), min_size=1).map(
    # a destination is written once; a source may be read more than once
    lambda by_destination: (list(by_destination.values()), list(by_destination.keys()))
)


def block_pairs(chunk: Chunk) -> list[tuple[int, int]]:
    """(source block, destination block) of every block a chunk copies."""
    found = []
    for source, destination in zip(chunk.source.tolist(), chunk.destination.tolist(), strict=True):
        assert source[1] == destination[1]
        assert source[1] % BLOCK_BYTES == 0
        assert source[2] == SOURCE.device_id
        assert destination[2] == DESTINATION.device_id
        for offset in range(0, source[1], BLOCK_BYTES):
            found.append(
                (
                    (source[0] + offset - SOURCE.address) // BLOCK_BYTES,
                    (destination[0] + offset - DESTINATION.address) // BLOCK_BYTES,
                )
            )
    assert chunk.bytes == len(found) * BLOCK_BYTES
    return found


@given(pairs)
def test_every_pair_is_copied_once(blocks: tuple[list[int], list[int]]) -> None:
    sources, destinations = blocks
    chunks = chunks_of(sources, destinations, BLOCK_BYTES, SOURCE, DESTINATION)
    copied = [pair for chunk in chunks for pair in block_pairs(chunk)]
    assert sorted(copied) == sorted(zip(sources, destinations, strict=True))


@given(st.permutations(range(40)), st.integers(0, 200), st.integers(0, 200))
def test_a_contiguous_run_is_one_range_in_whatever_order_it_is_named(
    order: list[int], first_source: int, first_destination: int
) -> None:
    sources = [first_source + at for at in order]
    destinations = [first_destination + at for at in order]
    (chunk,) = chunks_of(sources, destinations, BLOCK_BYTES, SOURCE, DESTINATION)
    assert chunk.source.tolist() == [
        [SOURCE.address + first_source * BLOCK_BYTES, 40 * BLOCK_BYTES, SOURCE.device_id]
    ]


def test_neighbours_on_one_side_only_stay_apart() -> None:
    (chunk,) = chunks_of([0, 1, 2], [9, 5, 6], BLOCK_BYTES, SOURCE, DESTINATION)
    assert chunk.source[:, 1].tolist() == [BLOCK_BYTES, 2 * BLOCK_BYTES]


def test_no_chunk_is_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * BLOCK_BYTES)
    blocks = list(range(10))
    chunks = chunks_of(blocks, blocks, BLOCK_BYTES, SOURCE, DESTINATION)
    assert [chunk.bytes // BLOCK_BYTES for chunk in chunks] == [3, 3, 3, 1]


def test_a_block_larger_than_the_bound_is_its_own_chunk() -> None:
    huge = module.CHUNK_BYTES + 1
    chunks = chunks_of([0, 1], [0, 1], huge, SOURCE, DESTINATION)
    assert [chunk.bytes for chunk in chunks] == [huge, huge]


def test_addresses_beyond_63_bits_are_kept() -> None:
    high = Side(address=(1 << 63) + 512, device_id=0, memory_type="DRAM")
    (chunk,) = chunks_of([2], [0], BLOCK_BYTES, high, DESTINATION)
    assert chunk.source.dtype == np.uint64
    assert chunk.source[0, 0] == (1 << 63) + 512 + 2 * BLOCK_BYTES
