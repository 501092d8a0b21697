"""Blocks arrive whole between workers that spread their heads over different numbers of devices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
from baton.kv.heads import heads_of
from baton.transfer import create_transfer
from baton.transfer import staging as staging_module
from baton.transfer.pieces import Pieces
from baton.transfer.spread import SpreadTransfer
from baton.transfer.wire import description_from_proto, description_to_proto

HEADS, BLOCKS = 4, 40
FORMATS = ("layer,kv,head,token,dim", "layer,kv,token,head,dim")


def whole_pool(layout_format: str, fill: int) -> torch.Tensor:
    """Blocks of 3 layers, 2 tokens, 5 dimensions, every value another one; or, with `fill` 0, empty."""
    sizes = {"layer": 3, "kv": 2, "head": HEADS, "token": 2, "dim": 5}
    shape = [BLOCKS, *(sizes[axis] for axis in layout_format.split(","))]
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.int32) * fill).view(shape)


class Worker:
    """A worker on `shards` devices whose blocks are those of `pool`."""

    def __init__(self, name: str, shards: int, pool: torch.Tensor, layout_format: str) -> None:
        axis = 1 + layout_format.split(",").index("head")
        self.heads = [heads_of(number, shards, HEADS) for number in range(shards)]
        self.pools = [pool.narrow(axis, heads.start, len(heads)).contiguous() for heads in self.heads]
        layout = KvLayout("model", "int32", 2, pool[0].nbytes, layout_format)
        create = partial(create_transfer, "inprocess")
        self.transfer = SpreadTransfer(create, self.pools, layout, name, "1")

    def close(self) -> None:
        self.transfer.close()


async def known(reader: Worker, source: Worker) -> str:
    description = description_from_proto(description_to_proto(source.transfer.describe()))
    assert description == source.transfer.describe()
    await reader.transfer.add_peer(description)
    return description.agent_name


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pair(stack: ExitStack, theirs: int, ours: int, layout_format: str = FORMATS[0]) -> tuple[Worker, Worker]:
    source = Worker("p", theirs, whole_pool(layout_format, 1), layout_format)
    reader = Worker("d", ours, whole_pool(layout_format, 0), layout_format)
    stack.enter_context(closing(source))
    stack.enter_context(closing(reader))
    return source, reader


@pytest.mark.parametrize("layout_format", FORMATS)
@pytest.mark.parametrize("ours", [1, 2, 4, 8])
@pytest.mark.parametrize("theirs", [1, 2, 4, 8])
async def test_every_head_arrives_in_its_place_and_nothing_else_is_touched(
    theirs: int, ours: int, layout_format: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        staging_module, "STAGING_BYTES", staging_module.BAYS * 3 * 960
    )  # three whole blocks in each
    source, reader = pair(stack, theirs, ours, layout_format)
    name = await known(reader, source)
    assert (await reader.transfer.warm_up(name, 5.0)).bytes > 0
    from_blocks, to_blocks = list(range(0, 34, 2)), list(range(39, 22, -1))
    report = await reader.transfer.read(name, from_blocks, to_blocks, 5.0)
    expected = Worker("e", ours, whole_pool(layout_format, 1), layout_format)
    stack.enter_context(closing(expected))
    for pool, right in zip(reader.pools, expected.pools, strict=True):
        assert torch.equal(pool[to_blocks], right[from_blocks])
        assert not pool[:23].any()
    if ours != theirs:
        assert report.bytes == len(from_blocks) * source.transfer.describe().layout.block_bytes
    assert reader.transfer.digests(to_blocks) == source.transfer.digests(from_blocks)


async def test_reads_side_by_side_do_not_mix(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "STAGING_BYTES", 4 * 960)
    source, reader = pair(stack, 2, 1)
    name = await known(reader, source)
    await asyncio.gather(
        *(reader.transfer.read(name, [block], [BLOCKS - 1 - block], 5.0) for block in range(BLOCKS))
    )
    assert torch.equal(reader.pools[0].flip(0), whole_pool(FORMATS[0], 1))


async def test_a_cancelled_read_has_ended_when_nothing_is_written_any_more(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reader = pair(stack, 1, 2)
    name = await known(reader, source)
    begun, go_on, ended = (threading.Event() for _ in range(3))
    deal_out = Pieces.deal_out

    def slowly(*arguments: Any) -> None:
        begun.set()
        go_on.wait(30)
        deal_out(*arguments)
        ended.set()

    monkeypatch.setattr(Pieces, "deal_out", slowly)
    reading = asyncio.create_task(reader.transfer.read(name, range(4), range(4), 30.0))
    await asyncio.to_thread(begun.wait, 30)
    reading.cancel()
    await asyncio.wait([reading], timeout=0.01)
    assert not reading.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert ended.is_set()


async def test_sources_that_hang_or_stop_fail_their_own_reads_only(stack: ExitStack) -> None:
    source, reader = pair(stack, 2, 1)
    name = await known(reader, source)
    other = Worker("q", 2, whole_pool(FORMATS[0], 1), FORMATS[0])
    gone = await known(reader, other)
    other.close()
    for _ in range(2 * staging_module.BAYS):
        with pytest.raises(HandoffFailed, match="has stopped"):
            await reader.transfer.read(gone, range(4), range(4), 5.0)
        with pytest.raises(HandoffFailed, match="did not deliver"):
            await reader.transfer.read(name, range(4), range(4), 0.0)
    await reader.transfer.read(name, range(4), range(4), 5.0)


async def test_another_incarnation_replaces_the_one_before(stack: ExitStack) -> None:
    source, reader = pair(stack, 2, 1)
    name = await known(reader, source)
    successor = SpreadTransfer(
        partial(create_transfer, "inprocess"), source.pools, source.transfer.describe().layout, "p", "2"
    )
    stack.enter_context(closing(successor))
    await reader.transfer.add_peer(successor.describe())
    with pytest.raises(HandoffFailed, match="p/1 is not a peer"):
        await reader.transfer.read(name, [0], [0], 5.0)
    await reader.transfer.read("p/2", [0], [0], 5.0)


@pytest.mark.parametrize(("theirs", "blocks"), [([0], [0, 1]), ([0], [BLOCKS]), ([0], [-1])])
async def test_lists_that_do_not_fit_are_our_own_mistake(
    theirs: list[int], blocks: list[int], stack: ExitStack
) -> None:
    source, reader = pair(stack, 2, 1)
    name = await known(reader, source)
    with pytest.raises(ValueError, match="block"):
        await reader.transfer.read(name, theirs, blocks, 5.0)


async def test_pools_that_are_not_parts_of_one_are_refused(stack: ExitStack) -> None:
    source, reader = pair(stack, 2, 1)
    description = source.transfer.describe()
    halved = replace(description.shards[1], total_blocks=BLOCKS // 2)
    with pytest.raises(HandoffFailed, match="not a part of p/1"):
        await reader.transfer.add_peer(replace(description, shards=(description.shards[0], halved)))
    with pytest.raises(HandoffFailed, match="cannot be in 3 pieces"):
        await reader.transfer.add_peer(replace(description, shards=(*description.shards, halved)))
