"""What is compared with does what is said of it."""

from __future__ import annotations

from baton.bench.trace import TraceRow
from baton.engine.scheduler import Limits
from baton.kv.pool import BlockPool
from baton.routing.attempts import Attempts
from baton.sim.job import Job, SimSequence
from baton.sim.peers import PrefillFirst
from baton.sim.workload import from_trace

BLOCK = 16


def sequence(number: int, tokens: int) -> SimSequence:
    *_, request = from_trace([TraceRow(0.0, tokens, 10)] * number, BLOCK)
    return SimSequence(Job(number, request, 0, Attempts(1, 0.0)), BLOCK)


def step(scheduler: PrefillFirst) -> list[tuple[int, int]]:
    """Run a step: the sequences in it, and how many tokens of each."""
    batch = scheduler.schedule()
    for item in batch:
        scheduler.advance(item)
        if item.samples:
            item.sequence.extend(1)  # type: ignore[attr-defined]
    return [(item.sequence.key, item.query_len) for item in batch]


def test_who_decodes_waits_while_prompts_do() -> None:
    scheduler = PrefillFirst(BlockPool(100), Limits(64, 8, 8))
    scheduler.submit(sequence(1, 40))
    assert step(scheduler) == [(1, 40)]
    assert step(scheduler) == [(1, 1)]
    scheduler.submit(sequence(2, 100))
    assert [step(scheduler) for _ in range(3)] == [[(2, 64)], [(2, 36)], [(1, 1), (2, 1)]]


def test_prompts_that_do_not_fit_keep_nobody_waiting() -> None:
    scheduler = PrefillFirst(BlockPool(4), Limits(64, 8, 8))
    scheduler.submit(sequence(1, 40))
    step(scheduler)
    scheduler.submit(sequence(2, 40))
    assert step(scheduler) == [(1, 1)]
