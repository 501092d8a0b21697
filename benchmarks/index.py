"""How fast a router finds who holds a prompt's prefix, and what that costs; beside Dynamo's radix tree.

    python benchmarks/index.py [--quick] [--peer-python PATH]

Blocks of 16 tokens lie in chains of 128, 1024 and 8192, a third of the blocks in each; 64 workers hold them,
one the whole of a chain, another its first half, a third its first eighth. Events come as they do from the
wire, 128 blocks in each, and are decoded as part of being taken. Lookups are of chains that are held, each
looked up once, `tokens` in and blocks per worker out: hashing is part of it ("both"), and measured alone
beside it: "hash" names every block, which baton's lookups need not, "find" is a lookup by names.

The peer is `dynamo.llm.RadixTree` of ai-dynamo-runtime with its own hashing, fed its own events (JSON), in a
process of its own: `--peer-python` names a Python that has it, best in a virtual environment of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BLOCK_TOKENS = 16
WORKERS = 64
EVENT_BLOCKS = 128
LENGTHS = (128, 1024, 8192)
SAMPLES = {128: 200, 1024: 40, 8192: 6}
PEER = "ai-dynamo-runtime"


def chain_lengths(size: int) -> Iterator[tuple[int, int]]:
    """The chains that `size` blocks make: the length a chain is meant to have, and the blocks it has."""
    for length in LENGTHS:
        share = size // len(LENGTHS)
        for start in range(0, share, length):
            yield length, min(length, share - start)


def prompts() -> dict[int, list[list[int]]]:
    """Tokens of the prompts that are looked up, by their length in blocks."""
    rng = random.Random(1)
    return {
        length: [rng.choices(range(150_000), k=BLOCK_TOKENS * length) for _ in range(SAMPLES[length])]
        for length in LENGTHS
    }


def holders(worker: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Who holds how many leading blocks of a chain."""
    yield worker, blocks
    yield (worker + 1) % WORKERS, blocks // 2
    yield (worker + 2) % WORKERS, blocks // 8


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Baton:
    """The router's replica, fed IndexEvents as bytes."""

    def __init__(self) -> None:
        from baton.kv.events import Stored, WorkerEvents
        from baton.kv.hashing import Chain, extend_chain
        from baton.kv.index import PrefixIndex
        from baton.rpc.kvstore_messages import decode_events, encode_events
        from baton.rpc.v1 import kvstore_pb2

        self._chain, self._extend_chain = Chain, extend_chain
        self._decode = decode_events
        self._from_wire = kvstore_pb2.IndexEvents.FromString
        self._encode, self._message, self._stored = encode_events, WorkerEvents, Stored
        self._index = PrefixIndex()
        self._sequence = [0] * WORKERS

    def hash(self, tokens: list[int]) -> list[bytes]:
        return self._extend_chain(bytes(16), tokens, BLOCK_TOKENS)

    def ask(self, tokens: list[int]) -> dict[str, int]:
        """What the router does: ids are computed as the search asks for them."""
        return self._index.lookup(self._chain(bytes(16), tokens, BLOCK_TOKENS))

    def random_ids(self, blocks: int) -> list[bytes]:
        raw = os.urandom(16 * blocks)
        return [raw[start : start + 16] for start in range(0, len(raw), 16)]

    def event(self, worker: int, ids: list[bytes], start: int, stop: int) -> tuple[int, bytes]:
        self._sequence[worker] += 1
        number = self._sequence[worker]
        event = self._stored(ids[start:stop])
        message = self._message(f"worker-{worker}", "1", number, number == 1, (event,))
        return worker, self._encode(message).SerializeToString()

    def apply(self, worker: int, event: bytes) -> None:
        self._index.apply(self._decode(self._from_wire(event)))

    def find(self, ids: list[bytes]) -> dict[str, int]:
        return self._index.lookup(ids)


class Dynamo:
    """dynamo.llm.RadixTree, fed KvCacheEvents as JSON."""

    def __init__(self) -> None:
        from dynamo.llm import RadixTree, compute_block_hash_for_seq

        self._hash = compute_block_hash_for_seq
        self._tree = RadixTree()
        self._events = 0

    def hash(self, tokens: list[int]) -> list[int]:
        return self._hash(tokens, BLOCK_TOKENS)

    def ask(self, tokens: list[int]) -> dict[tuple[int, int], int]:
        return self.find(self.hash(tokens))

    def random_ids(self, blocks: int) -> list[int]:
        return array("Q", os.urandom(8 * blocks)).tolist()

    def event(self, worker: int, ids: list[int], start: int, stop: int) -> tuple[int, bytes]:
        # A block's second hash covers all before it; these chains share nothing, so the first ones serve.
        self._events += 1
        stored = {
            "parent_hash": ids[start - 1] if start else None,
            "blocks": [{"block_hash": one, "tokens_hash": one} for one in ids[start:stop]],
        }
        return worker, json.dumps({"event_id": self._events, "data": {"stored": stored}}).encode()

    def apply(self, worker: int, event: bytes) -> None:
        self._tree.apply_event(worker, event)

    def find(self, ids: list[int]) -> dict[tuple[int, int], int]:
        return self._tree.find_matches(ids).scores


def measure(side: str, size: int) -> dict[str, float]:
    """Build an index of `size` blocks and look up in it; seconds, bytes and blocks per second by name."""
    subject = Baton() if side == "baton" else Dynamo()
    asked = prompts()
    chains = {length: [subject.hash(tokens) for tokens in asked[length]] for length in LENGTHS}
    held: dict[int, list[int]] = {length: [] for length in LENGTHS}
    gc.collect()
    gc.freeze()
    before = resident_bytes()
    spent_s, cpu_s, entries, distinct = 0.0, 0.0, 0, 0
    for number, (length, blocks) in enumerate(chain_lengths(size)):
        if len(held[length]) < SAMPLES[length]:
            ids = chains[length][len(held[length])][:blocks]
            held[length].append(blocks)
        else:
            ids = subject.random_ids(blocks)
        distinct += blocks
        events = []
        for holder, count in holders(number % WORKERS, blocks):
            entries += count
            for start in range(0, count, EVENT_BLOCKS):
                events.append(subject.event(holder, ids, start, min(count, start + EVENT_BLOCKS)))
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for holder, event in events:
            subject.apply(holder, event)
        spent_s += time.perf_counter() - began_s
        cpu_s += time.process_time() - began_cpu_s
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    subject.find(chains[LENGTHS[0]][0])  # what is applied behind the scenes counts too
    spent_s += time.perf_counter() - began_s
    cpu_s += time.process_time() - began_cpu_s
    gc.collect()
    found = {
        "events_blocks_per_s": entries / spent_s,
        "events_blocks_per_cpu_s": entries / cpu_s,
        "bytes_per_block": (resident_bytes() - before) / distinct,
    }
    for length in LENGTHS:
        kept = list(zip(asked[length], held[length], strict=False))
        hashing_s, finding_s, both_s = [], [], []
        for tokens, blocks in kept * (3 if len(kept) < 20 else 1):
            began_s = time.perf_counter()
            ids = subject.hash(tokens)
            hashed_s = time.perf_counter()
            scores = subject.find(ids)
            found_s = time.perf_counter()
            assert subject.ask(tokens) == scores
            done_s = time.perf_counter()
            assert max(scores.values()) == blocks, (max(scores.values()), blocks)
            hashing_s.append(hashed_s - began_s)
            finding_s.append(found_s - hashed_s)
            both_s.append(done_s - found_s)
        found[f"hash_{length}_s"] = statistics.median(hashing_s)
        found[f"find_{length}_s"] = statistics.median(finding_s)
        found[f"both_{length}_s"] = statistics.median(both_s)
        found[f"lookups_{length}_per_s"] = 1 / statistics.fmean(finding_s)
    return found


def run(python: str, side: str, size: int) -> dict[str, float] | str:
    """`measure` in a process of its own; a reason when there is no result."""
    root = Path(__file__).resolve().parent.parent
    command = [python, __file__, "--measure", side, "--size", str(size)]
    environ = os.environ | ({"PYTHONPATH": str(root)} if side == "baton" else {})
    ended = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=1800)
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def peer_version(python: str) -> str | None:
    code = f"from importlib.metadata import version; import dynamo.llm; print(version('{PEER}'))"
    ended = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
    return ended.stdout.strip() if ended.returncode == 0 else None


def figure(
    name: str, value: float | None, unit: str, goal: str | None, met: bool | None, **more: str
) -> dict:
    return {"figure": name, "value": value, "unit": unit, "goal": goal, "met": met, **more}


def report(
    sizes: list[int], results: dict[tuple[str, int], dict[str, float] | str], peer: str | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Prefix index, {WORKERS} workers; lookups of so many blocks, p50 in us")
    for column in (
        "blocks",
        "side",
        "event blocks/s",
        "per CPU s",
        "B/block",
        *(f"{n}: both / hash / find" for n in LENGTHS),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    figures = []
    peer_name = f"{PEER} {peer}" if peer else PEER
    for size in sizes:
        for side in ("baton", "dynamo"):
            got = results[side, size]
            if isinstance(got, str):
                table.add_row(f"{size:,}", side, got)
                continue
            times = [
                " / ".join(f"{got[f'{part}_{n}_s'] * 1e6:.0f}" for part in ("both", "hash", "find"))
                for n in LENGTHS
            ]
            row = (
                f"{got['events_blocks_per_s']:,.0f}",
                f"{got['events_blocks_per_cpu_s']:,.0f}",
                f"{got['bytes_per_block']:.0f}",
            )
            table.add_row(f"{size:,}", side, *row, *times)
        ours, theirs = results["baton", size], results["dynamo", size]
        if isinstance(ours, str):
            raise SystemExit(ours)
        rate, weight = ours["events_blocks_per_s"], ours["bytes_per_block"]
        figures.append(figure(f"events_{size}_blocks", rate, "blocks/s", ">= 1e6", rate >= 1e6))
        per_cpu = ours["events_blocks_per_cpu_s"]
        figures.append(figure(f"events_{size}_blocks_cpu", per_cpu, "blocks/CPU s", None, None))
        bounded = size >= 100_000  # below, it is the empty table that weighs
        figures.append(
            figure(
                f"memory_{size}_blocks",
                weight,
                "bytes/block",
                "< 100" if bounded else None,
                weight < 100 if bounded else None,
            )
        )
        for length in LENGTHS:
            lookups = ours[f"lookups_{length}_per_s"]
            figures.append(figure(f"lookup_{length}_of_{size}_blocks", lookups, "1/s", None, None))
            name = f"lookup_with_hashing_{length}_of_{size}_blocks_vs_dynamo"
            if isinstance(theirs, str):
                figures.append(figure(name, None, "ratio", ">= 1.0", None, peer=peer_name, reason=theirs))
                continue
            ratio = theirs[f"both_{length}_s"] / ours[f"both_{length}_s"]
            figures.append(figure(name, ratio, "ratio", ">= 1.0", ratio >= 1.0, peer=peer_name))
    Console(width=140).print(table)
    try:
        ours_version = version("baton-serve")
    except PackageNotFoundError:
        ours_version = "source"
    summary = {
        "benchmark": "index",
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"baton": ours_version, "python": platform.python_version(), PEER: peer},
        "figures": figures,
    }
    print(json.dumps(summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100 k blocks instead of 5 M")
    parser.add_argument("--peer-python", default=sys.executable, help=f"a Python that has {PEER}")
    parser.add_argument("--measure", choices=["baton", "dynamo"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.size)))
        return
    sizes = [1_000, 100_000] if chosen.quick else [1_000, 100_000, 5_000_000]
    peer = peer_version(chosen.peer_python)
    results: dict[tuple[str, int], dict[str, float] | str] = {}
    for size in sizes:
        results["baton", size] = run(sys.executable, "baton", size)
        results["dynamo", size] = (
            run(chosen.peer_python, "dynamo", size)
            if peer
            else f"not installed: pip install {PEER}==1.6.1, in an environment of its own, and --peer-python"
        )
    report(sizes, results, peer)


if __name__ == "__main__":
    main()
