"""Which blocks of the pool belong to no sequence: those that handoffs read into or that peers read from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from baton.engine.scheduler import Load, Scheduler
from baton.errors import HandoffFailed
from baton.kv.pool import NoFreeBlocks


@dataclass(eq=False)
class Reservation:
    """Blocks of this worker that a handoff reads into.

    `blocks` starts as the cached blocks of the prompt, pinned; `reserve` adds private ones.
    """

    blocks: list[int]
    held: int
    wanted: int = 0
    granted: Future[None] | None = None
    lost: bool = False


@dataclass(eq=False)
class Pinned:
    """Leading blocks of a chain that stay as they are until `unpin`, for a short while: another worker
    reads them, or they are read from one. The first `held` are shared, the rest private; `copied` is set when
    another worker has read them and keeps them from now on."""

    blocks: list[int]
    held: int
    copied: bool = False


class Reservations:
    """Keeps reservations in the order asked and serves them as blocks come free.

    Pure state; the caller's lock guards it. A future is settled as soon as its blocks are there.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._reservations: list[Reservation] = []
        self._asking: deque[Reservation] = deque()
        self._pinned: set[Pinned] = set()

    @property
    def waiting(self) -> int:
        """Reservations whose blocks are not there yet."""
        return len(self._asking)

    @property
    def reading(self) -> int:
        """Reservations that wait for no blocks: their handoffs are under way."""
        return len(self._reservations) - len(self._asking)

    # ---- for handoffs that are read -----------------------------------------------------------

    def pin_prefix(self, chain: Sequence[bytes]) -> Reservation:
        """See `Engine.pin_prefix`."""
        blocks = self._acquire(chain)
        reservation = Reservation(blocks, len(blocks))
        self._reservations.append(reservation)
        return reservation

    def reserve(self, reservation: Reservation, total: int) -> Future[None]:
        """See `Engine.reserve`."""
        reservation.wanted = total - len(reservation.blocks)
        reservation.granted = Future()
        reservation.granted.set_running_or_notify_cancel()  # whoever waits may give up
        if reservation.lost:
            reservation.granted.set_exception(_starved())
        else:
            self._asking.append(reservation)
            self.grant()
        return reservation.granted

    def hand_over(self, reservation: Reservation, blocks: int) -> None:
        """Its first `blocks` blocks belong to a sequence from now on; those beyond were not needed."""
        self._reservations.remove(reservation)
        self._scheduler.pool.release(reservation.blocks[blocks:])
        del reservation.blocks[blocks:]

    def drop(self, reservation: Reservation) -> None:
        """Give a reservation's blocks back; nothing happens if that was done."""
        if reservation in self._reservations:
            self._withdraw(reservation)
            self.grant()

    def grant(self) -> None:
        """Serve waiting reservations in order, as far as blocks and the batch limit allow."""
        while self._asking:
            reservation = self._asking[0]
            if not self._room_to_decode() or not self._extend(reservation):
                if self._is_stuck():
                    self._lose_one()
                    continue
                return
            self._asking.popleft()
            if reservation.granted is not None:
                reservation.granted.set_result(None)

    # ---- for peers that read, and for what is read from them ----------------------------------

    def pin(self, chain: Sequence[bytes]) -> Pinned:
        """Pin the leading blocks of `chain` that are cached here."""
        blocks = self._acquire(chain)
        pinned = Pinned(blocks, len(blocks))
        self._pinned.add(pinned)
        return pinned

    def pin_all(self, chain: Sequence[bytes]) -> tuple[Future[Pinned], Load | None]:
        """See `Engine.pin_all`; the caller carries out the load, if there is one."""
        pool, done = self._scheduler.pool, Future[Pinned]()
        done.set_running_or_notify_cancel()  # the blocks must come to somebody who lets them go
        pinned = self.pin(chain)
        start = pinned.held
        below = min(pool.match_below(chain, start), pool.available)
        held = pool.hold_below(chain[start : start + below])
        if not held or not self.extend(pinned, below):
            pool.let_go(held)
            done.set_result(pinned)
            return done, None

        def loaded(good: int) -> None:
            pool.release(pinned.blocks[start + good :])
            del pinned.blocks[start + good :]
            self.share(pinned, chain)
            done.set_result(pinned)

        return done, Load(held, pinned.blocks[start:], loaded)

    def extend(self, pinned: Pinned, count: int) -> bool:
        """Add private blocks, if that many can be had at once and nobody waits for blocks."""
        if self._asking:
            return False
        try:
            pinned.blocks += self._scheduler.pool.allocate(count)
        except NoFreeBlocks:
            return False
        return True

    def share(self, pinned: Pinned, chain: Sequence[bytes]) -> None:
        """Name the private blocks, which now hold the KV of `chain`'s blocks."""
        for index in range(pinned.held, len(pinned.blocks)):
            parent = chain[index - 1] if index else None
            pinned.blocks[index] = self._scheduler.pool.share(pinned.blocks[index], chain[index], parent)
        pinned.held = len(pinned.blocks)

    def unpin(self, pinned: Pinned) -> None:
        """Let the blocks go."""
        self._pinned.remove(pinned)
        if pinned.copied:
            self._scheduler.pool.release_copies(pinned.blocks)
        else:
            self._scheduler.pool.release(pinned.blocks)
        self.grant()

    def _acquire(self, chain: Sequence[bytes]) -> list[int]:
        pool = self._scheduler.pool
        return pool.acquire(chain[: pool.match(chain)])

    def _extend(self, reservation: Reservation) -> bool:
        try:
            reservation.blocks += self._scheduler.pool.allocate(reservation.wanted)
        except NoFreeBlocks:
            return False
        return True

    def _room_to_decode(self) -> bool:
        reading = sum(r.granted is not None and r.granted.done() for r in self._reservations)
        active = len(self._scheduler.running) + len(self._scheduler.loading)
        return active + reading < self._scheduler.limits.max_batch_requests

    def _is_stuck(self) -> bool:
        """Whether nobody but waiting reservations has blocks that could become free."""
        granted = any(r.granted is not None and r.granted.done() for r in self._reservations)
        scheduler = self._scheduler
        busy = scheduler.running or scheduler.loading or scheduler.holding or scheduler.ending or self._pinned
        return not busy and not granted

    def _lose_one(self) -> None:
        """Take the pinned blocks of the youngest reservation; its handoff fails and is placed anew."""
        youngest = next((r for r in reversed(self._reservations) if r.blocks), self._asking[-1])
        self._withdraw(youngest)
        youngest.lost = True
        if youngest.granted is not None:
            youngest.granted.set_exception(_starved())

    def _withdraw(self, reservation: Reservation) -> None:
        self._reservations.remove(reservation)
        if reservation in self._asking:
            self._asking.remove(reservation)
        self._scheduler.pool.release(reservation.blocks)
        reservation.blocks = []


def _starved() -> HandoffFailed:
    return HandoffFailed("no KV blocks for the handoff: waiting requests pin them all; raise --kv-blocks")
