"""The bytes of blocks below the device pool: one buffer of host memory, one file, two threads.

Coming down to host memory is a copy on the spot, because the block's place is about to be used again.
Everything slower is done by threads: one brings blocks up, the other writes the oldest ones to disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch

from baton.kv.events import Tier
from baton.kv.lower import Held, Spill
from baton.routing.rates import ReadRates
from baton.tiers.disk import BlockFile

log = logging.getLogger(__name__)

_MEASURED_BYTES = 16 * 1024 * 1024


class TierStore:
    """Host memory for `host_slots` blocks and, with `disk`, a file below it.

    Args:
        storages: the KV pool, blocks outermost, in its parts: one on each device of the model. On a GPU,
            host memory is pinned and copies run on streams of their own; whoever is told that a copy is done
            need not synchronize.
    """

    def __init__(self, storages: Sequence[torch.Tensor], host_slots: int, disk: BlockFile | None) -> None:
        self._parts: list[_Part] = []
        self._block_bytes = 0
        for storage in storages:
            part = _Part.of(storage, self._block_bytes)
            self._parts.append(part)
            self._block_bytes = part.place.stop
        self._disk = disk
        cuda = storages[0].is_cuda
        self._host = torch.empty((host_slots, self._block_bytes), dtype=torch.uint8, pin_memory=cuda)
        self._staged = torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=cuda)
        self._rates = ReadRates[Tier]()
        self._told_of_disk = False
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="kv-fetch")
        self._spilling = ThreadPoolExecutor(1, thread_name_prefix="kv-spill")

    def copy_down(self, block: int, host_slot: int) -> None:
        """See `Sink`."""
        for part in self._parts:
            with _on(part.down):
                below = self._host[host_slot, part.place]
                below.copy_(part.pool[block], non_blocking=part.down is not None)

    def settle(self) -> None:
        """See `Sink`."""
        for part in self._parts:
            _finish(part.down)

    def fetch(
        self, held: Sequence[Held], blocks: Sequence[int], done: Callable[[Sequence[str]], None]
    ) -> None:
        """Copy each held block to its pool block on a thread and call `done` there.

        `done` gets, per block, an empty string or why it could not be had; blocks after the first one
        that failed are not tried and get the same reason.
        """
        places = [(one.tier, one.slot) for one in held]
        self._fetching.submit(_reporting, lambda: done(self._fetch(places, blocks)))

    def spill(self, spills: Sequence[Spill], done: Callable[[Spill, bool], None]) -> None:
        """Write blocks to disk on a thread and call `done` there after each, with whether it worked."""
        work = [(spill, spill.held.slot) for spill in spills]
        self._spilling.submit(_reporting, lambda: self._spill(work, done))

    def read_rates(self) -> dict[Tier, float]:
        """Bytes per second into the pool from each tier: what was measured at start, corrected by reads."""
        return self._rates.now()

    def measure(self, blocks: Sequence[int]) -> None:
        """Find the read rates that reads will correct; call it before anything is stored.

        What is in the pool's `blocks` is lost.
        """
        count = min(len(blocks), self._host.shape[0], max(1, _MEASURED_BYTES // self._block_bytes))
        self._host[:count].zero_()
        self._begin_rate(Tier.HOST, blocks[:count])
        if self._disk is not None:
            for slot in range(count):
                self._disk.write(slot, _bytes(self._host[slot]))
            self._disk.forget_cached_pages()
            self._begin_rate(Tier.DISK, blocks[:count])

    def close(self) -> None:
        """Wait for the jobs that run; those that wait are dropped."""
        self._fetching.shutdown(cancel_futures=True)
        self._spilling.shutdown(cancel_futures=True)
        if self._disk is not None:
            self._disk.close()

    def _fetch(self, places: Sequence[tuple[Tier, int]], blocks: Sequence[int]) -> list[str]:
        fetched, reason = 0, ""
        try:
            for tier, group in groupby(zip(places, blocks, strict=True), key=lambda move: move[0][0]):
                count, reason = self._fetch_from(tier, [(slot, block) for (_, slot), block in group])
                fetched += count
                if reason:
                    break
        except Exception:  # whoever waits for these blocks must hear of it
            log.exception("KV blocks could not be brought up")
            return ["error"] * len(places)
        return [""] * fetched + [reason] * (len(places) - fetched)

    def _fetch_from(self, tier: Tier, moves: Sequence[tuple[int, int]]) -> tuple[int, str]:
        """Copy slots of one tier to blocks of the pool; how many came, and why not the next one."""
        started = time.perf_counter()
        count, reason = 0, ""
        for slot, block in moves:
            if reason := self._fetch_one(tier, slot, block):
                break
            count += 1
        for part in self._parts:
            _finish(part.up)
        self._rates.note(tier, count * self._block_bytes, time.perf_counter() - started)
        return count, reason

    def _fetch_one(self, tier: Tier, slot: int, block: int) -> str:
        if tier is Tier.HOST:
            self._copy_up(self._host[slot], block)
            return ""
        if self._disk is None:
            return "io_error"
        if reason := self._disk.read(slot, _bytes(self._staged)):
            return reason
        self._copy_up(self._staged, block)
        for part in self._parts:
            _finish(part.up)  # the buffer is used again
        return ""

    def _copy_up(self, below: torch.Tensor, block: int) -> None:
        for part in self._parts:
            with _on(part.up):
                part.pool[block].copy_(below[part.place], non_blocking=part.up is not None)

    def _spill(self, work: Sequence[tuple[Spill, int]], done: Callable[[Spill, bool], None]) -> None:
        for spill, host_slot in work:
            done(spill, self._write(spill.disk_slot, host_slot))

    def _write(self, disk_slot: int, host_slot: int) -> bool:
        if self._disk is None:
            return False
        try:
            self._disk.write(disk_slot, _bytes(self._host[host_slot]))
        except (OSError, ValueError) as error:
            if not self._told_of_disk:
                self._told_of_disk = True
                log.warning("KV blocks cannot be written to --kv-disk-path and are dropped: %s", error)
            return False
        if self._told_of_disk:
            self._told_of_disk = False
            log.info("KV blocks are written to --kv-disk-path again")
        return True

    def _begin_rate(self, tier: Tier, blocks: Sequence[int]) -> None:
        started = time.perf_counter()
        self._fetch([(tier, slot) for slot in range(len(blocks))], blocks)
        seconds = time.perf_counter() - started
        self._rates.begin(tier, len(blocks) * self._block_bytes / seconds)


@dataclass(frozen=True)
class _Part:
    """The pool on one device as bytes [blocks, ...], where it lies in a block's bytes below, and the streams
    of its copies down and up; None on the CPU."""

    pool: torch.Tensor
    place: slice
    down: torch.cuda.Stream | None
    up: torch.cuda.Stream | None

    @classmethod
    def of(cls, storage: torch.Tensor, start: int) -> _Part:
        pool = storage.flatten(1).view(torch.uint8)
        down, up = (_stream(storage.device) if storage.is_cuda else None for _ in range(2))
        return cls(pool, slice(start, start + pool.shape[1]), down, up)


def _bytes(block: torch.Tensor) -> memoryview:
    view: memoryview = block.numpy().data
    return view


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _finish(stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        event = stream.record_event()
        event.synchronize()


def _reporting(job: Callable[[], None]) -> None:
    """Run a job of a thread; what it raises ends nothing else but is said."""
    try:
        job()
    except Exception:
        log.exception("moving KV between tiers failed")
