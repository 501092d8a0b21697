"""What moves between device, host memory and disk beside the engine's steps, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from baton.engine.interfaces import TierMover
from baton.engine.scheduler import Load
from baton.kv.events import Tier
from baton.kv.lower import Spill
from baton.kv.pool import BlockPool


@dataclass
class Tiering:
    """Starts moves between the tiers of a pool and records how they end.

    `lock` guards the pool: the caller of `start` has it, and threads of the mover take it to record a move.
    `settled` is called with it then.
    """

    pool: BlockPool
    mover: TierMover | None
    lock: AbstractContextManager[object]
    settled: Callable[[], None]
    misses: Counter[tuple[Tier, str]] = field(default_factory=Counter, init=False)
    """Blocks of a tier that could not be used, by why."""
    fetched_blocks: Counter[Tier] = field(default_factory=Counter, init=False)
    """Blocks brought up from a tier."""

    def start(self, loads: Sequence[Load]) -> None:
        """Bring up what `loads` name, and send down what lies in the way."""
        if self.mover is None:
            return
        for load in loads:
            self.mover.fetch(load.held, load.blocks, partial(self._loaded, load))
        if self.pool.lower is not None and (spills := self.pool.lower.spills()):
            self.mover.spill(spills, self._spilled)

    def _loaded(self, load: Load, reasons: Sequence[str]) -> None:
        with self.lock:
            good = next((at for at, reason in enumerate(reasons) if reason), len(reasons))
            load.loaded(good)
            for held, reason in zip(load.held, reasons, strict=True):
                if reason:
                    self.misses[held.tier, reason] += 1
                    self.pool.lose(held)
                else:
                    self.fetched_blocks[held.tier] += 1
                    self.pool.let_go([held])
            self.settled()

    def _spilled(self, spill: Spill, ok: bool) -> None:
        with self.lock:
            if self.pool.lower is not None:
                self.pool.lower.spilled(spill, ok=ok)
            if not ok:
                self.misses[Tier.DISK, "write_error"] += 1
            self.settled()
