"""How long steps take on this machine: measured at start, given to routers to predict with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median

import torch

from baton.engine.runner import Runner
from baton.engine.scheduler import Scheduled
from baton.engine.sequence import Sequence
from baton.kv.pool import BlockPool
from baton.sampling import Sampling

ROUNDS = 3
DECODE_CONTEXT = 64
#: Seconds that finding one curve may take when a worker starts.
START_BUDGET_S = 0.3
_ENOUGH_S = 0.05


def measure_prefill(
    runner: Runner,
    pool: BlockPool,
    block_size: int,
    sizes: Iterable[int],
    *,
    budget_s: float = START_BUDGET_S,
) -> dict[int, float]:
    """Seconds of one prompt against its tokens, for the smallest two `sizes` and then as many as can be
    measured in `budget_s`. Also warms the device up."""
    return _measure(pool, sizes, lambda size: [_sequence(size, 0, block_size, pool)], runner, budget_s)


def measure_decode(
    runner: Runner,
    pool: BlockPool,
    block_size: int,
    sizes: Iterable[int],
    *,
    context: int = DECODE_CONTEXT,
    budget_s: float = START_BUDGET_S,
) -> dict[int, float]:
    """Seconds of one decode step against the requests in it, each with `context` tokens, a short one if not
    given. As many of the `sizes` as with `measure_prefill`."""

    def batch(size: int) -> list[Sequence]:
        return [_sequence(context, context - 1, block_size, pool) for _ in range(size)]

    return _measure(pool, sizes, batch, runner, budget_s)


def _measure(
    pool: BlockPool,
    sizes: Iterable[int],
    make: Callable[[int], list[Sequence]],
    runner: Runner,
    budget_s: float,
) -> dict[int, float]:
    """Median seconds per size, ascending; stops when the next size would not fit the budget or the pool."""
    curve: dict[int, float] = {}
    last = 0
    for size in sorted(set(sizes)):
        if len(curve) > 1 and curve[last] * size / last > budget_s:
            break
        sequences = make(size)
        try:
            if any(not sequence.blocks for sequence in sequences):
                break  # the pool is smaller than this size
            rounds = [_seconds(runner, sequences)]
            while len(rounds) <= ROUNDS and sum(rounds) < _ENOUGH_S:
                rounds.append(_seconds(runner, sequences))
        finally:
            for sequence in sequences:
                pool.release(sequence.blocks)
        curve[size] = median(rounds[1:] or rounds)  # the first one warms up
        budget_s -= sum(rounds)
        last = size
    return curve


def _seconds(runner: Runner, sequences: list[Sequence]) -> float:
    started = time.perf_counter()
    runner.run([Scheduled.next_of(each, each.remaining) for each in sequences])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _sequence(tokens: int, computed: int, block_size: int, pool: BlockPool) -> Sequence:
    """A made-up sequence with blocks of its own; without blocks when the pool has too few left."""
    sequence = Sequence(
        key=0,
        request_id="measure",
        tokens=[0] * tokens,
        prompt_len=tokens,
        sampling=Sampling(max_tokens=1, temperature=0.0),
        root=bytes(16),
        block_size=block_size,
        computed=computed,
    )
    needed = sequence.blocks_for(tokens)
    sequence.blocks = pool.allocate(needed) if needed <= pool.available else []
    return sequence
