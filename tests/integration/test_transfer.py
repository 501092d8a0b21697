"""KV blocks read out of other processes: the right bytes, and nothing worse than HandoffFailed otherwise."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.errors import HandoffFailed
from baton.kv.hashing import KvLayout
from baton.transfer import PoolDescription, Transfer, create_transfer
from baton.transfer.base import TransferUnavailable
from baton.transfer.loopback import loopback_check
from baton.transfer.wire import description_from_proto, description_to_proto
from tests.integration.pool_process import PoolProcess

LAYOUT = KvLayout("model", "float32", block_size=16, block_bytes=64 * 1024, format="blocks-first")
TIMEOUT_S = 60.0
MARK = -7

StartSource = Callable[..., PoolProcess]


@pytest.fixture(params=["any", "tcp"])
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the two processes share: everything this machine has, or TCP alone as between containers."""
    if request.param == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp,self")
    return str(request.param)


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP alone: the source takes part in every read, so a source that hangs hangs the read."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")


@pytest.fixture
def start_source() -> Iterator[StartSource]:
    """Starts pools in other processes: `start_source(worker_id="p", incarnation="1", blocks=64, seed=0)`."""
    started: list[PoolProcess] = []

    def start(
        worker_id: str = "prefill-1", incarnation: str = "a", blocks: int = 64, seed: int = 0
    ) -> PoolProcess:
        started.append(PoolProcess(worker_id, incarnation, LAYOUT, blocks, seed))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@asynccontextmanager
async def reader(blocks: int = 64) -> AsyncIterator[tuple[Transfer, torch.Tensor]]:
    """A transfer in this process and its pool, int64 [blocks, words], all MARK."""
    pool = torch.full((blocks, LAYOUT.block_bytes // 8), MARK, dtype=torch.int64)
    transfer = create_transfer("nixl", pool, LAYOUT, "decode-1", "x")
    try:
        yield transfer, pool
    finally:
        transfer.close()


async def connect(transfer: Transfer, source: PoolProcess) -> str:
    """Introduce the source as workers do, its description having crossed the wire."""
    description = await asyncio.to_thread(source.description)
    await transfer.add_peer(description_from_proto(description_to_proto(description)))
    await transfer.warm_up(description.agent_name, TIMEOUT_S)
    return description.agent_name


async def test_random_blocks_arrive_byte_for_byte_and_no_other_is_touched(
    network: str, start_source: StartSource
) -> None:
    source = start_source(blocks=200)
    expected = source.expected()
    choose = random.Random(7)
    async with reader(blocks=150) as (transfer, pool):
        name = await connect(transfer, source)
        for _ in range(40):
            count = choose.randint(0, 150)
            sources = [choose.randrange(200) for _ in range(count)]
            destinations = choose.sample(range(150), count)
            pool.fill_(MARK)
            report = await transfer.read(name, sources, destinations, TIMEOUT_S)
            assert report.bytes == count * LAYOUT.block_bytes
            wanted = torch.full_like(pool, MARK)
            wanted[destinations] = expected[sources]
            assert torch.equal(pool, wanted)


async def test_a_read_of_many_chunks_arrives_whole(network: str, start_source: StartSource) -> None:
    blocks = 2500  # 156 MiB: three chunks
    source = start_source(blocks=blocks)
    async with reader(blocks) as (transfer, pool):
        name = await connect(transfer, source)
        report = await transfer.read(name, range(blocks), range(blocks), TIMEOUT_S)
        assert report.bytes == blocks * LAYOUT.block_bytes
        assert torch.equal(pool, source.expected())


async def test_many_concurrent_reads_from_two_sources(network: str, start_source: StartSource) -> None:
    sources = [start_source("prefill-1", seed=0), start_source("prefill-2", seed=1)]
    async with reader(blocks=128) as (transfer, pool):
        names = [await connect(transfer, source) for source in sources]
        async with asyncio.TaskGroup() as group:
            for block in range(128):
                name = names[block % 2]
                group.create_task(transfer.read(name, [block // 2], [block], TIMEOUT_S))
        assert torch.equal(pool[0::2], sources[0].expected())
        assert torch.equal(pool[1::2], sources[1].expected())


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_fingerprint", "other"),
        ("dtype", "bfloat16"),
        ("block_size", 32),
        ("block_bytes", 4096),
        ("format", "layers-first"),
    ],
)
async def test_a_pool_of_another_layout_is_refused_by_the_name_of_the_difference(
    field: str, value: str | int
) -> None:
    async with reader() as (transfer, _):
        ours = transfer.describe()
        layout = replace(LAYOUT, **{field: value})
        theirs = replace(ours, agent_name="prefill-1/a", incarnation="a", layout=layout)
        with pytest.raises(HandoffFailed, match=f"its {field} is {value!r}"):
            await transfer.add_peer(theirs)


@pytest.mark.parametrize("metadata", [b"", b"nonsense", bytes(2000)])
async def test_unusable_metadata_is_refused_and_harms_nothing(
    metadata: bytes, start_source: StartSource
) -> None:
    source = start_source()
    async with reader() as (transfer, _):
        bad = replace(transfer.describe(), agent_name="prefill-9/a", incarnation="a", agent_metadata=metadata)
        with pytest.raises(HandoffFailed, match="prefill-9/a"):
            await transfer.add_peer(bad)
        name = await connect(transfer, source)
        await transfer.read(name, [0], [0], TIMEOUT_S)


async def test_metadata_under_another_name_is_refused(start_source: StartSource) -> None:
    source = start_source("prefill-1")
    async with reader() as (transfer, _):
        description = await asyncio.to_thread(source.description)
        with pytest.raises(HandoffFailed, match="is that of prefill-1/a"):
            await transfer.add_peer(replace(description, agent_name="prefill-2/a"))


async def test_blocks_that_do_not_exist_are_refused(start_source: StartSource) -> None:
    source = start_source(blocks=64)
    async with reader(blocks=32) as (transfer, pool):
        name = await connect(transfer, source)
        with pytest.raises(HandoffFailed, match="named block 64 and has 64 blocks"):
            await transfer.read(name, [64], [0], TIMEOUT_S)
        with pytest.raises(ValueError, match="outside the pool of 32 blocks"):
            await transfer.read(name, [0], [32], TIMEOUT_S)
        with pytest.raises(ValueError, match="2 source blocks for 1 destination"):
            await transfer.read(name, [0, 1], [0], TIMEOUT_S)
        assert (pool == MARK).all()


async def test_an_unknown_or_removed_peer_is_refused(start_source: StartSource) -> None:
    source = start_source()
    async with reader() as (transfer, _):
        with pytest.raises(HandoffFailed, match="prefill-1/a is not a peer"):
            await transfer.read("prefill-1/a", [0], [0], TIMEOUT_S)
        name = await connect(transfer, source)
        await transfer.remove_peer(name)
        await transfer.remove_peer(name)
        with pytest.raises(HandoffFailed, match="prefill-1/a is not a peer"):
            await transfer.read(name, [0], [0], TIMEOUT_S)


async def test_a_source_killed_during_reads_fails_them_and_its_successor_is_read(
    network: str, start_source: StartSource
) -> None:
    blocks = 2048
    async with reader(blocks) as (transfer, pool):
        for incarnation in ("a", "b"):
            source = start_source("prefill-1", incarnation, blocks, seed=ord(incarnation))
            name = await connect(transfer, source)
            await transfer.read(name, range(blocks), range(blocks), TIMEOUT_S)
            assert torch.equal(pool, source.expected())
            reads = [
                asyncio.create_task(read_until_it_fails(transfer, name, range(first, blocks, 3)))
                for first in range(3)
            ]
            await asyncio.sleep(0.02)
            source.kill()
            async with asyncio.timeout(TIMEOUT_S):
                for failure in await asyncio.gather(*reads):
                    assert isinstance(failure, HandoffFailed)


async def read_until_it_fails(transfer: Transfer, name: str, blocks: range) -> HandoffFailed:
    while True:
        try:
            await transfer.read(name, blocks, blocks, TIMEOUT_S)
        except HandoffFailed as error:
            return error


async def test_a_new_incarnation_replaces_the_old_one(start_source: StartSource) -> None:
    async with reader() as (transfer, pool):
        old = await connect(transfer, start_source("prefill-1", "a"))
        new_source = start_source("prefill-1", "b", seed=3)
        new = await connect(transfer, new_source)
        with pytest.raises(HandoffFailed, match="prefill-1/a is not a peer"):
            await transfer.read(old, [0], [0], TIMEOUT_S)
        await transfer.read(new, range(64), range(64), TIMEOUT_S)
        assert torch.equal(pool, new_source.expected())


async def test_a_cancelled_read_never_writes_its_blocks_again(tcp: None, start_source: StartSource) -> None:
    blocks = 4096  # 256 MiB: a good part of a second over TCP
    source = start_source(blocks=blocks)
    async with reader(blocks) as (transfer, pool):
        name = await connect(transfer, source)
        for part in (0.1, 0.5, 0.0):
            read = asyncio.create_task(transfer.read(name, range(blocks), range(blocks), TIMEOUT_S))
            await first_bytes(pool, at=int(part * blocks))
            read.cancel()
            with pytest.raises(asyncio.CancelledError):
                await read
            pool.fill_(MARK)
            for _ in range(5):  # whatever still came would come with these
                await transfer.read(name, [0], [0], TIMEOUT_S)
            assert (pool[1:] == MARK).all()
            pool.fill_(MARK)


async def first_bytes(pool: torch.Tensor, at: int) -> None:
    """Wait until block `at` has been written to."""
    async with asyncio.timeout(TIMEOUT_S):
        while bool((pool[at, :16] == MARK).all()):
            await asyncio.sleep(0.001)


async def test_a_source_that_hangs_costs_its_reads_the_deadline_and_others_nothing(
    tcp: None, start_source: StartSource
) -> None:
    blocks = 4096
    hung, healthy = start_source("prefill-1", blocks=blocks), start_source("prefill-2", blocks=blocks, seed=1)
    async with reader(2 * blocks) as (transfer, pool):
        hung_name, healthy_name = await connect(transfer, hung), await connect(transfer, healthy)
        doomed = asyncio.create_task(transfer.read(hung_name, range(blocks), range(blocks), 2.0))
        await first_bytes(pool, at=0)
        hung.signal(signal.SIGSTOP)
        others = asyncio.create_task(reads_until(transfer, healthy_name, blocks, doomed))
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(HandoffFailed, match="prefill-1/a did not deliver within"):
                await doomed
        pool[:blocks].fill_(MARK)
        assert await others > 0
        assert torch.equal(pool[blocks:], healthy.expected())
        hung.signal(signal.SIGCONT)
        for _ in range(5):
            await transfer.read(healthy_name, [0], [blocks], TIMEOUT_S)
        assert (pool[:blocks] == MARK).all()


async def reads_until(transfer: Transfer, name: str, blocks: int, until: asyncio.Task[object]) -> int:
    """Read the whole source into the upper half until `until` is done; how often. None of them may fail."""
    count = 0
    while not until.done():
        await transfer.read(name, range(blocks), range(blocks, 2 * blocks), TIMEOUT_S)
        count += 1
    return count


async def test_a_source_that_lets_go_of_its_pool_ends_reads_quickly(
    network: str, start_source: StartSource
) -> None:
    blocks = 2048
    source = start_source(blocks=blocks)
    async with reader(blocks) as (transfer, _):
        name = await connect(transfer, source)
        read = asyncio.create_task(read_until_it_fails(transfer, name, range(blocks)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(source.ask, "close")
        # Shared memory needs nobody's help: there the bytes are there still, and reads may go on.
        patience_s = 1.0 if network == "any" else TIMEOUT_S / 2
        with suppress(TimeoutError) if network == "any" else nullcontext():
            async with asyncio.timeout(patience_s):
                assert isinstance(await read, HandoffFailed)


async def test_closing_the_reader_fails_its_reads(tcp: None, start_source: StartSource) -> None:
    blocks = 4096
    source = start_source(blocks=blocks)
    pool = torch.full((blocks, LAYOUT.block_bytes // 8), MARK, dtype=torch.int64)
    transfer = create_transfer("nixl", pool, LAYOUT, "decode-1", "x")
    name = await connect(transfer, source)
    read = asyncio.create_task(transfer.read(name, range(blocks), range(blocks), TIMEOUT_S))
    await first_bytes(pool, at=0)
    transfer.close()
    with pytest.raises(HandoffFailed, match="this worker is stopping"):
        await read
    pool.fill_(MARK)
    with pytest.raises(HandoffFailed, match="this worker is stopping"):
        await transfer.read(name, [0], [0], TIMEOUT_S)
    assert (pool == MARK).all()
    assert source.alive


async def test_a_reader_killed_in_a_read_leaves_its_source_serving(start_source: StartSource) -> None:
    source = start_source("prefill-1", blocks=1024)
    description = await asyncio.to_thread(source.description)
    for incarnation in ("a", "b"):
        victim = start_source("decode-2", incarnation, blocks=1024)
        await asyncio.to_thread(victim.description)
        await asyncio.to_thread(victim.ask, "read_forever", description)
        await asyncio.sleep(0.05)
        victim.kill()
        async with reader(blocks=1024) as (transfer, pool):
            await transfer.add_peer(description)
            await transfer.read(description.agent_name, range(1024), range(1024), TIMEOUT_S)
            assert torch.equal(pool, source.expected())


async def test_connected_but_idle_neither_side_uses_a_core(network: str, start_source: StartSource) -> None:
    source = start_source()
    async with reader() as (transfer, _):
        name = await connect(transfer, source)
        await transfer.read(name, range(64), range(64), TIMEOUT_S)
        ours, theirs = time.process_time(), source.ask("cpu")
        await asyncio.sleep(1.0)
        # A spinning thread would use 1.0; these use 0.001.
        assert time.process_time() - ours < 0.2
        assert source.ask("cpu") - theirs < 0.2


async def test_killed_processes_leave_nothing_behind(start_source: StartSource) -> None:
    def shared_memory(creators: set[int]) -> list[str]:
        """SysV segments of these processes, and UCX's files, which have no owner's name on them."""
        segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        of_creators = [line for line in segments if int(line.split()[4]) in creators]
        return of_creators + [
            str(path) for path in (*Path("/dev/shm").glob("ucx*"), *Path("/tmp").glob("ucx*"))
        ]

    source, victim = start_source("prefill-1"), start_source("decode-2")
    description: PoolDescription = await asyncio.to_thread(source.description)
    await asyncio.to_thread(victim.description)
    await asyncio.to_thread(victim.ask, "read_forever", description)
    assert shared_memory({source.pid, victim.pid})  # or the check below cannot fail
    victim.kill()
    source.kill()
    async with asyncio.timeout(TIMEOUT_S):
        while shared_memory({source.pid, victim.pid}):  # files of others' processes live for an instant
            await asyncio.sleep(0.01)


def test_the_loopback_check_says_how_fast_and_over_what(network: str) -> None:
    report = loopback_check(size_bytes=8 * 1024 * 1024)
    assert report.bytes == 8 * 1024 * 1024
    assert report.bytes_per_s > 0
    assert "UCX" in report.plugins
    assert ("tcp" in report.path) == (network == "tcp")


def test_the_loopback_check_says_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "no-such-transport")
    with pytest.raises(TransferUnavailable, match="cannot start its UCX backend"):
        loopback_check(size_bytes=1024 * 1024)
