"""The in-process transfer keeps the promises of `Transfer`, and descriptions survive the wire."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
from baton.transfer import Transfer, create_transfer
from baton.transfer.base import Pool
from baton.transfer.verify import require_equal
from baton.transfer.wire import (
    description_from_proto,
    description_to_proto,
    layout_from_proto,
    layout_to_proto,
)

LAYOUT = KvLayout("model", "int32", block_size=4, block_bytes=48, format="f")


class Pair:
    """A source holding 200 different blocks and an empty reader that knows it."""

    def __init__(self) -> None:
        self.source_pool = torch.arange(200 * 12, dtype=torch.int32).view(200, 3, 4)
        self.pool = torch.zeros((200, 12), dtype=torch.int32)
        self.source: Transfer = create_transfer("inprocess", self.source_pool, LAYOUT, "p", "1")
        self.reader: Transfer = create_transfer("inprocess", self.pool, LAYOUT, "d", "1")


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.reader.close()
    pair.source.close()


async def test_blocks_arrive_and_no_other_is_touched(pair: Pair) -> None:
    await pair.reader.add_peer(pair.source.describe())
    assert (await pair.reader.warm_up("p/1", 1.0)).bytes == 200 * 48
    report = await pair.reader.read("p/1", range(150), range(50, 200), 5.0)
    assert report.bytes == 150 * 48
    assert torch.equal(pair.pool[50:], pair.source_pool[:150].flatten(1))
    assert (pair.pool[:50] == 0).all()


async def test_what_arrived_otherwise_than_it_was_there_is_noticed(pair: Pair) -> None:
    await pair.reader.add_peer(pair.source.describe())
    await pair.reader.read("p/1", range(5), range(10, 15), 5.0)
    there = pair.source.digests(range(5))
    assert len(set(there)) == 5
    require_equal("p/1", range(5), there, pair.reader.digests(range(10, 15)))
    pair.pool[12, 7] += 1
    with pytest.raises(HandoffFailed, match="block 2 of p/1"):
        require_equal("p/1", range(5), there, pair.reader.digests(range(10, 15)))
    with pytest.raises(HandoffFailed, match="5 blocks with 0 digests"):
        require_equal("p/1", range(5), [], pair.reader.digests(range(10, 15)))


async def test_a_cancelled_read_writes_nothing_more(pair: Pair) -> None:
    await pair.reader.add_peer(pair.source.describe())
    read = asyncio.create_task(pair.reader.read("p/1", range(200), range(200), 5.0))
    await asyncio.sleep(0)
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read
    pair.pool.fill_(-1)
    await asyncio.sleep(0)
    assert (pair.pool == -1).all()


async def test_a_passed_deadline_fails_the_read(pair: Pair) -> None:
    await pair.reader.add_peer(pair.source.describe())
    with pytest.raises(HandoffFailed, match="did not deliver"):
        await pair.reader.read("p/1", range(200), range(200), 0.0)


async def test_peers_of_other_processes_layouts_and_transports_are_refused(pair: Pair) -> None:
    there = pair.source.describe()
    with pytest.raises(HandoffFailed, match="q/1 is not in this process"):
        await pair.reader.add_peer(replace(there, agent_name="q/1"))
    with pytest.raises(HandoffFailed, match="its dtype is 'float16'"):
        await pair.reader.add_peer(replace(there, layout=replace(LAYOUT, dtype="float16")))
    with pytest.raises(HandoffFailed, match="same --transfer"):
        await pair.reader.add_peer(replace(there, transport="nixl"))


async def test_a_new_incarnation_replaces_the_old(pair: Pair) -> None:
    await pair.reader.add_peer(pair.source.describe())
    successor = create_transfer("inprocess", pair.source_pool, LAYOUT, "p", "2")
    await pair.reader.add_peer(successor.describe())
    with pytest.raises(HandoffFailed, match="p/1 is not a peer"):
        await pair.reader.read("p/1", [0], [0], 1.0)
    successor.close()
    with pytest.raises(HandoffFailed, match="p/2 has stopped"):
        await pair.reader.read("p/2", [0], [0], 1.0)


def test_choosing_it_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        create_transfer("inprocess", torch.zeros((1, 48), dtype=torch.uint8), LAYOUT, "w", "1").close()
    assert "within this process only" in caplog.text


def test_descriptions_and_layouts_survive_the_wire(pair: Pair) -> None:
    description = replace(pair.source.describe(), agent_metadata=b"\x00\xff", pool_address=(1 << 64) - 4096)
    assert description_from_proto(description_to_proto(description)) == description
    assert layout_from_proto(layout_to_proto(LAYOUT)) == LAYOUT
    assert description.worker_id == "p"


@pytest.mark.parametrize("field", ["memory_type", "transport"])
def test_a_description_of_a_later_version_is_refused(pair: Pair, field: str) -> None:
    message = description_to_proto(pair.source.describe())
    setattr(message, field, "teleport")
    with pytest.raises(HandoffFailed, match="'teleport', known are"):
        description_from_proto(message)


@pytest.mark.parametrize(
    "storage",
    [
        torch.zeros((4, 47), dtype=torch.uint8),
        torch.zeros((0, 48), dtype=torch.uint8),
        torch.zeros((48, 4), dtype=torch.uint8).t(),
        torch.tensor(0),
    ],
)
def test_a_tensor_that_is_no_pool_is_refused(storage: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pool"):
        Pool.of(storage, LAYOUT)


def test_importing_the_package_loads_neither_nixl_nor_torch() -> None:
    check = "import sys, baton.transfer, baton.transfer.wire; print({'nixl', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
