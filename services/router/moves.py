"""How a choice gets away from a worker that gives it up, while it goes on there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from baton.routing import Placement, Unplaceable
from baton.rpc.v1 import worker_pb2
from services.router.generation import Generation
from services.router.metrics import Metrics
from services.router.placement import Hold, Placer
from services.router.sessions import Attempt, SessionBroken, SessionPool

log = logging.getLogger(__name__)

# Targets that are tried for one choice, and the first pause between two, which doubles: the stream of the one
# before may linger at the worker that is left, and only one may take the choice at a time.
_MOST_TRIES = 8
_PAUSE_S = 0.05
# For the word of the worker that takes over, when the one that is left has said its last.
_SETTLE_S = 2.0

MakeStart = Callable[[Placement], worker_pb2.Start]
"""The rest of the choice, as it stands now, for a placement's decode worker."""


@dataclass(frozen=True)
class Workers:
    """What finding a worker for a choice takes. `changed` returns when the reachable ones have changed."""

    placer: Placer
    sessions: SessionPool
    changed: Callable[[], Awaitable[None]]
    metrics: Metrics


class Leg:
    """Where a choice runs now: a placement, and the request on the session of its decode worker.

    As a context manager it takes the placement's promises back and cancels what still runs there.
    """

    def __init__(self, hold: Hold, sessions: SessionPool, make_start: MakeStart, prompt: int) -> None:
        """`prompt` is the choice's `Generation.prompt_key`.

        Raises:
            SessionBroken: the worker cannot be reached now; the promises are taken back.
        """
        self.hold = hold
        self.worker_id = hold.placement.decode.worker_id
        try:
            session = sessions.connected(self.worker_id)
            if session is None:
                raise SessionBroken(f"no session with {self.worker_id}")
            self.attempt: Attempt = session.start(make_start(hold.placement), prompt)
        except SessionBroken:
            hold.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.hold.release()
        self.attempt.close()


class Move:
    """Finds a worker that takes a choice over from `source`, beside whoever follows the choice there.

    As an async context manager it runs the search, and at the end gives up what `next_leg` has not given out.
    """

    def __init__(
        self,
        source: Leg,
        generation: Generation,
        output: Sequence[int],
        make_start: MakeStart,
        workers: Workers,
    ) -> None:
        """`output` grows while the choice goes on at `source`."""
        self._source = source
        self._generation = generation
        self._output = output
        self._make_start = make_start
        self._workers = workers
        self._tries_left = _MOST_TRIES
        self._leg: Leg | None = None
        self._starts_after: int | None = None

    async def __aenter__(self) -> Self:
        self._search = asyncio.create_task(self._find())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._search.cancel()
        await asyncio.wait([self._search])
        self._drop()
        if not self._search.cancelled() and (error := self._search.exception()) is not None:
            log.error("request %s: the search for another worker failed", self._generation.request_id)
            raise error

    async def next_leg(self) -> Leg | None:
        """Where the choice goes on after the output so far, now that `source` has said its last; None when it
        has been moved nowhere, or to after tokens that have not arrived here."""
        self._tries_left = 0
        if self._leg is not None:
            await asyncio.wait([self._search], timeout=_SETTLE_S)
        leg = self._leg
        if leg is None or self._starts_after != len(self._output):
            self._workers.metrics.moved("lost")
            return None
        self._leg = None
        self._workers.metrics.moved("moved")
        return leg

    async def _find(self) -> None:
        """Try workers until one has taken the choice over."""
        avoid, pause_s = frozenset({self._source.worker_id}), _PAUSE_S
        while not await self._taken_over(hold := await self._place(avoid)):
            avoid |= {hold.placement.decode.worker_id}
            self._workers.metrics.moved("refused")
            self._tries_left -= 1
            if self._tries_left <= 0:
                return
            await asyncio.sleep(pause_s)
            pause_s *= 2

    async def _place(self, avoid: frozenset[str]) -> Hold:
        """A worker that was not tried yet; when there is none, any other than the source, as soon as there is
        one."""
        place, source = self._workers.placer.place_decode, frozenset({self._source.worker_id})
        with suppress(Unplaceable):
            return place(self._generation, self._output, avoid)
        while True:
            try:
                return place(self._generation, self._output, source)
            except Unplaceable:
                await self._workers.changed()

    async def _taken_over(self, hold: Hold) -> bool:
        def make_start(placement: Placement) -> worker_pb2.Start:
            start = self._make_start(placement)
            start.move_from.CopyFrom(self._source.attempt.place)
            return start

        try:
            self._leg = leg = Leg(hold, self._workers.sessions, make_start, self._generation.prompt_key)
            first = await leg.attempt.first()
        except SessionBroken as error:
            log.info("request %s stays for now: %s", self._generation.request_id, error)
        else:
            if first.HasField("moved"):
                hold.release()
                self._starts_after = first.moved.output_tokens
                return True
            log.info("request %s stays for now: %s", self._generation.request_id, first.error.message)
        self._drop()
        return False

    def _drop(self) -> None:
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.close()
