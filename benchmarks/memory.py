"""How much of the KV pool is allocated and not used, and how much memory each process of a cluster takes.

    python benchmarks/memory.py --trace AzureLLMInferenceTrace_conv.csv [--quick]

The trace is Azure's (github.com/Azure/AzurePublicDataset); without `--trace`, an excerpt from tests/data.
Its requests go through the real scheduler and pool of one worker in virtual time, at the speed of a large
GPU with an 8 B model (16 k prompt tokens/s, 15 to 60 ms per decode step).

- unused: token slots of sequences' blocks that hold no token's KV, over all their slots, each step weighed by
  its seconds. Blocks that are only cached are not counted: they are given up whenever they are wanted.
- of prompts: the part that belongs to prompts of which not all is computed. They get all their blocks at
  once, so that a prompt once begun always ends.

Then a cluster of the bundled model is started (`baton up --prefill 1 --decode 1`), serves requests until its
pools are full, and the resident memory of its processes is printed beside the bytes of weights and KV pool in
them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baton.bench.trace import TraceRow, read_trace
from baton.config import Settings
from baton.engine.scheduler import Limits, Scheduler
from baton.kv.pool import BlockPool
from baton.routing.pacing import Pace
from baton.routing.view import Curve
from baton.sim.job import Job, SimSequence
from baton.sim.workload import SimRequest, from_trace
from tests.cluster import run_cluster

ROOT = Path(__file__).resolve().parent.parent
EXCERPT = ROOT / "tests" / "data" / "azure_conversation_excerpt.csv"
BLOCK_SIZES = (16, 64, 256)
POOL_TOKENS = 400_000
LIMITS = Limits(max_batch_tokens=2048, max_batch_requests=256, max_waiting=1_000_000)
SPEED = Pace(prefill=Curve(((2048, 0.128),)), decode=Curve(((1, 0.015), (256, 0.060))))
GOAL = 0.04
MIB = 1024**2
KV_BYTES = 64 * MIB
FILLING_REQUESTS = 12


@dataclass(frozen=True)
class Waste:
    """Token slots times the seconds for which they were allocated, and those of them that held nothing."""

    allocated: float
    unused: float
    unused_of_prompts: float
    preemptions: int

    @property
    def share(self) -> float:
        return self.unused / self.allocated


def pool_waste(requests: Sequence[SimRequest], block_size: int) -> Waste:
    """Run the requests through one worker's scheduler and pool."""
    scheduler = Scheduler(BlockPool(POOL_TOKENS // block_size), LIMITS)
    now_s, arrived = 0.0, 0
    allocated = unused = unused_of_prompts = 0.0
    while arrived < len(requests) or scheduler.running or scheduler.waiting:
        while arrived < len(requests) and requests[arrived].arrival_s <= now_s:
            scheduler.submit(SimSequence(Job(arrived, requests[arrived], router=0), block_size))
            arrived += 1
        batch = scheduler.schedule()
        if not batch:
            now_s = requests[arrived].arrival_s
            continue
        decoding = sum(item.samples and item.query_len == 1 for item in batch)
        seconds = SPEED.step_s(decoding, sum(item.query_len for item in batch) - decoding)
        now_s += seconds
        for sequence in scheduler.running:
            slots = len(sequence.blocks) * block_size
            empty = slots - sequence.computed - sequence.ahead
            allocated += slots * seconds
            unused += empty * seconds
            if sequence.remaining > 1:
                unused_of_prompts += empty * seconds
        for item in batch:
            scheduler.advance(item)
            if item.samples and isinstance(item.sequence, SimSequence):
                item.sequence.extend(1)
                if item.sequence.output_len >= item.sequence.sampling.max_tokens:
                    scheduler.release(item.sequence)
        scheduler.pool.take_events()
    return Waste(allocated, unused, unused_of_prompts, scheduler.preemptions)


@dataclass(frozen=True)
class Process:
    """Resident bytes of a process, and what of weights and KV it was given."""

    name: str
    resident: int
    weights: int
    pool: int


def processes() -> list[Process]:
    """A small cluster's processes when its pools are full."""
    weights = sum(path.stat().st_size for path in Path(Settings().model.model).glob("*.safetensors"))
    with (
        tempfile.TemporaryDirectory() as folder,
        run_cluster(Path(folder), "--prefill", "1", "--decode", "1", "--kv-bytes", str(KV_BYTES)) as cluster,
    ):
        for number in range(FILLING_REQUESTS):
            body = {"prompt": [100 + number] * 1000, "max_tokens": 16, "ignore_eos": True}
            httpx.post(f"{cluster.base_url}/v1/completions", json=body, timeout=60).raise_for_status()
        found = []
        for name, pid in sorted(cluster.pids().items()):
            is_worker = name in cluster.workers()
            pool = 0
            if is_worker:
                status = cluster.status(name)
                pool = status.load.total_blocks * status.layout.block_bytes
            resident = psutil.Process(pid).memory_info().rss
            found.append(Process(name, resident, weights if is_worker else 0, pool))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, default=EXCERPT, help="an Azure trace [an excerpt]")
    parser.add_argument("--quick", action="store_true", help="the first 1000 requests, one block size")
    arguments = parser.parse_args()
    rows = read_trace(arguments.trace, "azure")
    sizes: Sequence[int] = BLOCK_SIZES
    if arguments.quick:
        rows, sizes = rows[:1000], BLOCK_SIZES[:1]
    console = Console(width=110)
    figures = waste_table(console, rows, sizes) + process_table(console)
    report = {
        "benchmark": "memory",
        "device": f"{platform.machine()}, {os.cpu_count()} cores; the pool in virtual time",
        "versions": {"torch": version("torch"), "python": platform.python_version()},
        "trace": arguments.trace.name,
        "requests": len(rows),
        "figures": figures,
    }
    print(json.dumps(report))


def waste_table(console: Console, rows: Sequence[TraceRow], sizes: Sequence[int]) -> list[dict[str, object]]:
    """Print what of the pool is unused at each block size; the figures."""
    table = Table(
        "tokens per block", "unused %", "of prompts %", "preemptions", title=f"{len(rows)} requests"
    )
    figures: list[dict[str, object]] = []
    for size in sizes:
        waste = pool_waste(list(from_trace(rows, size)), size)
        of_prompts = waste.unused_of_prompts / waste.allocated
        table.add_row(
            str(size), f"{100 * waste.share:.2f}", f"{100 * of_prompts:.2f}", str(waste.preemptions)
        )
        judged = size == BLOCK_SIZES[0]
        figures.append(
            {
                "figure": f"pool_unused_blocks_of_{size}",
                "value": round(waste.share, 5),
                "unit": "ratio",
                "goal": f"< {GOAL}" if judged else None,
                "met": waste.share < GOAL if judged else None,
            }
        )
    console.print(table)
    return figures


def process_table(console: Console) -> list[dict[str, object]]:
    """Print what memory the processes of a cluster take; the figures."""
    table = Table("process", "resident MiB", "weights", "KV pool", "beyond both")
    figures: list[dict[str, object]] = []
    for process in processes():
        beyond = process.resident - process.weights - process.pool
        cells = (process.resident, process.weights, process.pool, beyond)
        table.add_row(process.name, *(f"{value / MIB:.0f}" for value in cells))
        figures.append(
            {
                "figure": f"resident_{process.name}",
                "value": process.resident,
                "unit": "bytes",
                "goal": None,
                "met": None,
            }
        )
    console.print(table)
    return figures


if __name__ == "__main__":
    main()
