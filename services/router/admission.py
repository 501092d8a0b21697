"""The door: requests start while there is room, else wait their turn, or are told when to come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.config import BadSetting, RouterSettings
from baton.errors import BatonError, InvalidRequest, Overloaded, Unavailable
from baton.routing.admission import Admission, Limits, Refused, Ticket
from baton.security.access import Access
from services.router.caller import Caller
from services.router.metrics import Metrics
from services.router.placement import Placer

_REASONS = {
    "queue_full": "as many requests as may are waiting",
    "displaced": "requests of callers with less work waiting went first",
    "too_late": "the request would not start in time",
    "queue_timeout": "the request did not start in time",
}


class NotAdmitted(Overloaded):
    """No place came free in time, or none would; `reason` is one word for the metric."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(
            f"the cluster is busy: {_REASONS[reason]}; retry after {max(1.0, retry_after_s):.0f} s",
            retry_after_s=retry_after_s,
        )
        self.reason = reason


class Door:
    """Lets requests in, in the order of `baton.routing.admission`.

    A place is a choice in flight, the unit of work workers see: a request with n=4 takes four.
    """

    def __init__(self, settings: RouterSettings, access: Access, placer: Placer, metrics: Metrics) -> None:
        """
        Raises:
            BadSetting: the tenants' weights cannot be read.
        """
        self._places = settings.max_running
        limits = Limits(
            places=settings.max_running,
            batch_places=max(1, int(settings.max_running * settings.batch_share)),
            waiting=settings.max_queued,
            wait_s={"interactive": settings.queue_timeout_s, "batch": settings.batch_queue_timeout_s},
        )
        self._queue = Admission(limits, access.weights(parse_weights(settings.tenant_weights)))
        self._ahead_s = settings.prefill_ahead_s
        self._placer = placer
        self._metrics = metrics
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Refuse everything from now on, those who wait included: the router is stopping."""
        self._closed = True
        waiters, self._waiters = self._waiters, {}
        for ticket, waiter in waiters.items():
            self._queue.leave(ticket)
            if not waiter.done():
                waiter.set_exception(shutting_down())

    @asynccontextmanager
    async def admitted(
        self, caller: Caller, places: int, *, prompt_tokens: int, output_tokens: int
    ) -> AsyncIterator[float]:
        """Hold `places` while inside; gives the seconds that were waited for them.

        Args:
            prompt_tokens, output_tokens: the work expected, of all choices together.

        Raises:
            NotAdmitted: a queue is full, or the wait would be or was too long.
            InvalidRequest: more places than there are.
            Unavailable: the router is stopping.
        """
        if self._closed:
            raise shutting_down()
        if places > self._places:
            raise InvalidRequest(
                f"n: {places} choices in one request, this router takes at most {self._places}", field="n"
            )
        now_s = time.monotonic()
        ticket = Ticket(
            *(caller.tenant, caller.slo, places, prompt_tokens, output_tokens),
            arrived_s=now_s,
            deadline_s=now_s + caller.timeout_s,
        )
        waited_s = 0.0
        if not self._queue.start(ticket, now_s, room=self._placer.has_room(self._ahead_s)):
            await self._wait(ticket)
            waited_s = time.monotonic() - now_s
        metrics = self._metrics
        metrics.queue_seconds[caller.slo].observe(waited_s)
        metrics.running.set(self._queue.running)
        try:
            yield waited_s
        finally:
            self._queue.finish(ticket)
            metrics.running.set(self._queue.running)
            self.advance()

    def advance(self) -> None:
        """Let in whose turn it is: a place, or room on a worker, may have come free."""
        if not self._waiters:
            return
        ticket = self._queue.next(time.monotonic(), room=self._placer.has_room(self._ahead_s))
        if ticket is None:
            return
        waiter = self._waiters.pop(ticket)
        if not waiter.done():
            waiter.set_result(None)
        # The next one only when this one's work is promised to a worker and counts.
        asyncio.get_running_loop().call_soon(self.advance)

    def waiting(self) -> dict[str, int]:
        """Requests that wait, by class."""
        return {"interactive": self._queue.waiting("interactive"), "batch": self._queue.waiting("batch")}

    async def _wait(self, ticket: Ticket) -> None:
        pace = self._placer.pace(self._ahead_s)
        try:
            displaced = self._queue.wait(ticket, ticket.arrived_s, pace)
        except Refused as refused:
            raise NotAdmitted(refused.reason, refused.retry_after_s) from None
        if displaced is not None:
            victim, refusal = displaced
            waiter = self._waiters.pop(victim)
            if not waiter.done():
                waiter.set_exception(NotAdmitted(refusal.reason, refusal.retry_after_s))
        loop = asyncio.get_running_loop()
        waiter = self._waiters[ticket] = loop.create_future()
        limit_s = self._queue.latest_start_s(ticket) - time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                await waiter
        except (NotAdmitted, Unavailable):
            raise
        except BaseException as error:
            if self._waiters.pop(ticket, None) is not None:
                self._queue.leave(ticket)
            else:  # its turn came at the same moment
                self._queue.finish(ticket)
                self.advance()
            if isinstance(error, TimeoutError):
                pace = self._placer.pace(self._ahead_s)
                retry_after_s = self._queue.predicted_wait_s(ticket, time.monotonic(), pace)
                raise NotAdmitted("queue_timeout", retry_after_s) from None
            raise


def parse_weights(text: str) -> dict[str, float]:
    """`a=2,b=0.5` as a mapping.

    Raises:
        BadSetting: it is not of that form, or a weight is not above 0.
    """
    weights: dict[str, float] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, number = item.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = 0.0
        if not name or not 0 < weights[name] < float("inf"):
            raise BadSetting(
                f"--tenant-weights: {item!r} is not NAME=WEIGHT with a weight above 0", field="tenant_weights"
            )
    return weights


def reason_of(error: BatonError) -> str:
    """Why a request was refused, in a word for the metric."""
    return error.reason if isinstance(error, NotAdmitted) else error.openai_type


def shutting_down() -> Unavailable:
    """What a router answers that is stopping."""
    return Unavailable("the router is shutting down; send the request again")
