"""KV that another worker keeps goes before what only this one has."""

from __future__ import annotations

from baton.engine.reservations import Reservations
from baton.engine.scheduler import Limits, Scheduler
from baton.engine.sequence import Sequence
from baton.kv.pool import BlockPool
from baton.sampling import Sampling

BLOCK = 4
LIMITS = Limits(max_batch_tokens=64, max_batch_requests=8, max_waiting=8)


def sequence(token: int, blocks: int) -> Sequence:
    tokens = [token] * (blocks * BLOCK + 1)
    return Sequence(0, "", tokens, len(tokens), Sampling(4, temperature=0.0), bytes(16), BLOCK)


def computed(scheduler: Scheduler, one: Sequence) -> list[bytes]:
    """Run a prompt here, to its end; the names of its blocks."""
    scheduler.submit(one)
    for item in scheduler.schedule():
        scheduler.advance(item)
    scheduler.release(one)
    return one.chain(len(one.tokens) // BLOCK)


def test_the_kv_of_a_handoff_goes_first_and_that_of_a_prompt_computed_here_last() -> None:
    scheduler = Scheduler(BlockPool(8), LIMITS)
    here = computed(scheduler, sequence(1, 3))
    read = sequence(2, 3)
    scheduler.adopt(read, scheduler.pool.allocate(4), 0)
    scheduler.release(read)
    scheduler.pool.allocate(5)
    assert scheduler.pool.match(here) == 3
    assert scheduler.pool.match(read.chain(3)) == 0


def test_what_a_peer_has_pulled_goes_first_here() -> None:
    scheduler = Scheduler(BlockPool(6), LIMITS)
    reservations = Reservations(scheduler)
    older, lent = (computed(scheduler, sequence(token, 2)) for token in (1, 2))
    pinned = reservations.pin(lent)
    pinned.copied = True
    reservations.unpin(pinned)
    scheduler.pool.allocate(4)
    assert (scheduler.pool.match(older), scheduler.pool.match(lent)) == (2, 0)
