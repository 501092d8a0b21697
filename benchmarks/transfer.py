"""How fast KV blocks are read from another process, beside NIXL's own agent and memcpy; what idling costs.

    python benchmarks/transfer.py [--quick]

One source and one reader process per peer and network, one pair after the other. "any" leaves the choice to
UCX (shared memory between processes of one host), "tcp" is UCX_TLS=tcp,self as between hosts without RDMA.
The peer is `nixl_agent` as its constructor makes it, polled without a pause.

What decided how baton makes progress, on 2 cores of an AMD EPYC (nixl 1.5.1, UCX 1.23), medians while nothing
else ran (the first row: 1.0 is what it takes when it gets it):

| progress for the source                            | idle CPU | 64 KiB any / tcp | 64 MiB any / tcp    |
|----------------------------------------------------|----------|------------------|---------------------|
| NIXL's progress thread, delay 0 (NIXL's default)   | 0.98     | this script measures it as the peer   ||
| a Python thread, get_new_notifs every 50 to 500 us | 0.11     | 10 us / 0.23 ms  | 9.2 / 0.5-0.9 GB/s  |
| NIXL's progress thread, delay 100 ms (50 in baton) | 0.0006   | 10 us / 0.09 ms  | 11 / 0.7-0.9 GB/s   |

With a delay the progress thread sleeps on UCX's event descriptor and is woken by messages; the delay is only
how long a lost wake-up would cost. With every core taken by others (load 7 to 9), 64 MiB over TCP: 0.09 GB/s
with NIXL's default on both sides, 0.23 GB/s with the Python thread, 0.40 GB/s with the sleeping one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from exposed import exposed_figures
from rich.console import Console
from rich.table import Table
from served import Figure, figure, print_report

from baton.kv.hashing import KvLayout
from baton.transfer import create_transfer
from baton.transfer.loopback import loopback_check

BLOCK_BYTES = 64 * 1024
NETWORKS = {"any": "", "tcp": "tcp,self"}
PEER = f"nixl {version('nixl')} nixl_agent()"
MIB = 1024 * 1024
GOAL = 0.9


@dataclass(frozen=True)
class Case:
    """A read of `blocks` blocks, in one run on both sides or every second block."""

    blocks: int
    scattered: bool

    @property
    def bytes(self) -> int:
        return self.blocks * BLOCK_BYTES

    @property
    def source_blocks(self) -> list[int]:
        return list(range(0, 2 * self.blocks, 2) if self.scattered else range(self.blocks))

    @property
    def name(self) -> str:
        return f"{self.bytes // 1024}KiB_{self.blocks if self.scattered else 1}_ranges"


@dataclass(frozen=True)
class Measured:
    """Median seconds per case, and the CPU seconds per second of both sides while connected and idle."""

    seconds: list[float]
    idle_reader: float
    idle_source: float


def cases(quick: bool) -> list[Case]:
    sizes = [1, 16, 64, 256, 1024] if quick else [1, 4, 16, 64, 256, 1024, 4096]
    return [
        Case(blocks, scattered)
        for blocks in sizes
        for scattered in (False, True)
        if blocks > 1 or not scattered
    ]


def pool(blocks: int) -> torch.Tensor:
    """Every page touched, so that no measurement pays for the kernel's first-touch zeroing."""
    return torch.ones((blocks, BLOCK_BYTES), dtype=torch.uint8)


def layout() -> KvLayout:
    return KvLayout("benchmark", "uint8", block_size=16, block_bytes=BLOCK_BYTES, format="benchmark")


def serve_baton(pipe: Connection, blocks: int) -> None:
    storage = pool(blocks)
    transfer = create_transfer("nixl", storage, layout(), "source", "1")
    pipe.send(transfer.describe())
    answer_cpu(pipe)
    transfer.close()


def serve_peer(pipe: Connection, blocks: int) -> None:
    from nixl._api import nixl_agent

    storage = pool(blocks)
    agent = nixl_agent("source")
    agent.register_memory(storage)
    pipe.send((agent.get_agent_metadata(), storage.data_ptr()))
    answer_cpu(pipe)


def answer_cpu(pipe: Connection) -> None:
    while pipe.poll(None):
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(time.process_time())


def idle(pipe: Connection, seconds: float) -> tuple[float, float]:
    """CPU seconds per second of (this process, the source)."""

    def source() -> float:
        pipe.send("cpu")
        return float(pipe.recv())

    ours, theirs = time.process_time(), source()
    time.sleep(seconds)
    return (time.process_time() - ours) / seconds, (source() - theirs) / seconds


def more(taken: list[float], quick: bool) -> bool:
    """Whether more reads are to be measured after these."""
    budget_s = 0.3 if quick else 2.0
    return len(taken) < 3 or (sum(taken) < budget_s and len(taken) < 1000)


def median_seconds(read: Callable[[], object], quick: bool) -> float:
    read()
    taken: list[float] = []
    while more(taken, quick):
        before = time.perf_counter()
        read()
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)


async def median_awaited(read: Callable[[], Awaitable[object]], quick: bool) -> float:
    """As `median_seconds`, inside a running loop, as a worker reads."""
    await read()
    taken: list[float] = []
    while more(taken, quick):
        before = time.perf_counter()
        await read()
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)


def measure_baton(pipe: Connection, quick: bool) -> Measured:
    blocks = 2 * cases(quick)[-1].blocks
    storage = pool(blocks)
    transfer = create_transfer("nixl", storage, layout(), "reader", "1")
    description = pipe.recv()
    with asyncio.Runner() as runner:
        runner.run(transfer.add_peer(description))
        runner.run(transfer.warm_up(description.agent_name, 60))
        seconds = []
        for case in cases(quick):
            named = case.source_blocks

            def read(named: list[int] = named) -> Awaitable[object]:
                return transfer.read(description.agent_name, named, named, 60)

            seconds.append(runner.run(median_awaited(read, quick)))
        reader, source = idle(pipe, 1.0 if quick else 3.0)
    transfer.close()
    return Measured(seconds, reader, source)


def measure_peer(pipe: Connection, quick: bool) -> Measured:
    from nixl._api import nixl_agent

    blocks = 2 * cases(quick)[-1].blocks
    storage = pool(blocks)
    agent = nixl_agent("reader")
    agent.register_memory(storage)
    metadata, address = pipe.recv()
    name = agent.add_remote_agent(metadata)
    seconds = []
    for case in cases(quick):
        runs = (
            [(block * BLOCK_BYTES, BLOCK_BYTES) for block in case.source_blocks]
            if case.scattered
            else [(0, case.bytes)]
        )

        def read(runs: list[tuple[int, int]] = runs) -> None:
            here = agent.get_xfer_descs([(storage.data_ptr() + at, size, 0) for at, size in runs], "DRAM")
            there = agent.get_xfer_descs([(address + at, size, 0) for at, size in runs], "DRAM")
            handle = agent.initialize_xfer("READ", here, there, name)
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"the peer's read ended with {state}")
            agent.release_xfer_handle(handle)

        seconds.append(median_seconds(read, quick))
    reader, source = idle(pipe, 1.0 if quick else 3.0)
    return Measured(seconds, reader, source)


def measure_memcpy(quick: bool) -> list[float]:
    blocks = 2 * cases(quick)[-1].blocks
    here, there = pool(blocks), pool(blocks)

    def copy(case: Case) -> Callable[[], object]:
        step = 2 if case.scattered else 1
        end = step * case.blocks
        return lambda: here[0:end:step].copy_(there[0:end:step])

    return [median_seconds(copy(case), quick) for case in cases(quick)]


def child(who: str, quick: bool) -> None:
    """Measure one of the two in this process, its source in another; the result is the last line."""
    torch.set_num_threads(1)
    serve, measure = {"baton": (serve_baton, measure_baton), "peer": (serve_peer, measure_peer)}[who]
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    source = context.Process(target=serve, args=(theirs, 2 * cases(quick)[-1].blocks), daemon=True)
    source.start()
    theirs.close()
    measured = measure(ours, quick)
    ours.close()
    source.join()
    print(json.dumps(asdict(measured)), flush=True)


def measure(who: str, network: str, quick: bool) -> Measured:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "UCX_LOG_FILE": "stderr"}
    if NETWORKS[network]:
        environ["UCX_TLS"] = NETWORKS[network]
    command = [sys.executable, __file__, "--child", who, *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, timeout=600)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats, under a minute")
    parser.add_argument("--child", choices=["baton", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.quick)
        return
    quick = arguments.quick
    torch.set_num_threads(1)
    memcpy = measure_memcpy(quick)
    figures: list[Figure] = []
    console = Console()
    for network in NETWORKS:
        baton, peer = measure("baton", network, quick), measure("peer", network, quick)
        table = Table(title=f"reads between two processes, network: {network}")
        for column in (
            "KiB",
            "ranges",
            "baton",
            "nixl_agent",
            "memcpy",
            "baton GB/s",
            "speed of baton / nixl_agent",
        ):
            table.add_column(column, justify="right")
        for case, ours, theirs, copy in zip(cases(quick), baton.seconds, peer.seconds, memcpy, strict=True):
            ranges = case.blocks if case.scattered else 1
            speed, ratio = case.bytes / ours, theirs / ours
            table.add_row(
                f"{case.bytes // 1024:,}",
                str(ranges),
                *(f"{seconds * 1e3:.3f} ms" for seconds in (ours, theirs, copy)),
                f"{speed / 1e9:.2f}",
                f"{ratio:.2f}",
            )
            name = f"{network}_read_{case.name}"
            goal = GOAL if case.bytes >= 4 * MIB else None
            figures.append(figure(f"{name}_vs_peer", ratio, "ratio", at_least=goal, peer=PEER))
            figures.append(figure(f"{name}_vs_memcpy", copy / ours, "ratio", peer="torch copy_"))
            figures.append(figure(name, speed, "bytes/s", peer=f"{PEER}: {case.bytes / theirs:.4g}"))
        console.print(table)
        small = baton.seconds[0]
        theirs = peer.seconds[0]
        figures.append(
            figure(f"{network}_latency_64KiB", small, "s", at_most=1e-3, peer=f"{PEER}: {theirs:.4g}")
        )
        for side in ("reader", "source"):
            ours, theirs = getattr(baton, f"idle_{side}"), getattr(peer, f"idle_{side}")
            console.print(f"idle CPU of the {side}: baton {ours:.4f} of a core, {PEER} {theirs:.4f}")
            figures.append(
                figure(
                    f"{network}_idle_cpu_{side}", ours, "cores", at_most=0.01, peer=f"{PEER}: {theirs:.4f}"
                )
            )
    figures += exposed_figures(console, quick)
    console.print(f"path between processes of this machine: {loopback_check().path}")
    print_report("transfer", figures, {"nixl": version("nixl")})


if __name__ == "__main__":
    main()
