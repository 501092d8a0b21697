"""The door of simulated routers: `baton.routing.admission` in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from baton.routing.admission import Admission, Limits, Refused, Ticket
from baton.sim.clock import Clock
from baton.sim.job import Job
from baton.sim.router import SimRouter

_LOOK_AGAIN_S = 0.05


class Door:
    """Lets requests in as `services/router/admission.py` does: one door in front of all routers.

    `let_in` is called for each request whose turn it is, `refuse` with a word for each that must go.
    """

    def __init__(
        self,
        limits: Limits,
        clock: Clock,
        let_in: Callable[[Job], None],
        refuse: Callable[[Job, str], None],
    ) -> None:
        self._queue = Admission(limits, {})
        self._clock = clock
        self._let_in = let_in
        self._refuse = refuse
        self._waiting: dict[Ticket, tuple[Job, SimRouter]] = {}
        self._looking = False

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def enter(self, job: Job, router: SimRouter) -> None:
        """A request comes."""
        now_s, request = self._clock.now_s, job.request
        ticket = Ticket(
            *(request.tenant, request.slo, 1, request.prompt_tokens, request.output_tokens),
            arrived_s=now_s,
            deadline_s=inf,
        )
        if self._queue.start(ticket, now_s, room=router.has_room()):
            job.ticket = ticket
            self._let_in(job)
            return
        try:
            displaced = self._queue.wait(ticket, now_s, router.pace())
        except Refused as refused:
            self._refuse(job, refused.reason)
            return
        self._waiting[ticket] = job, router
        self._clock.at(self._queue.latest_start_s(ticket), self._expire, ticket)
        if displaced is not None:
            victim, _ = self._waiting.pop(displaced[0])
            self._refuse(victim, displaced[1].reason)
        self._look()

    def left(self, job: Job) -> None:
        """A request that was let in is over."""
        ticket, job.ticket = job.ticket, None
        if ticket is not None:
            self._queue.finish(ticket)
            self._advance()

    def _expire(self, ticket: Ticket) -> None:
        waited = self._waiting.pop(ticket, None)
        if waited is not None:
            self._queue.leave(ticket)
            self._refuse(waited[0], "queue_timeout")

    def _look(self) -> None:
        """Look again soon: a worker may have room before a request ends."""
        if not self._looking and self._waiting:
            self._looking = True
            self._clock.after(_LOOK_AGAIN_S, self._look_again)

    def _look_again(self) -> None:
        self._looking = False
        self._advance()
        self._look()

    def _advance(self) -> None:
        """Let in whose turn it is, one after the other, as long as there is room."""
        while self._waiting:
            router = next(iter(self._waiting.values()))[1]
            ticket = self._queue.next(self._clock.now_s, room=router.has_room())
            if ticket is None:
                return
            job, _ = self._waiting.pop(ticket)
            job.ticket = ticket
            self._let_in(job)
