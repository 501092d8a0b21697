"""Which role a worker has: its own, or one that it is lent for a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from baton.routing.view import Role
from baton.worker.metrics import ROLE_CHANGES

log = logging.getLogger(__name__)

LONGEST_S = 86_400.0
"""Seconds for which a role may be lent."""


class Timer(Protocol):
    """What `later` gives; `asyncio.TimerHandle` is one."""

    def cancel(self) -> None:
        """Let what was asked for not happen."""


class Holder(Protocol):
    """Whose role it is; `WorkerState` is one."""

    role: Role
    own_role: Role

    def become(self, role: Role) -> None:
        """Take another role."""


class RoleKeeper:
    """The one that changes a worker's role. `close` it before the worker ends.

    Whoever lends a role has to say so again before its time is over. Who does not, for it was turned off or
    died, leaves no worker in a role that nobody wants it to have.
    """

    def __init__(
        self,
        holder: Holder,
        announce: Callable[[], None],
        later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        """`announce` is called after a change; `later(seconds, action)` acts when the seconds are over."""
        self._holder = holder
        self._announce = announce
        self._later = later
        self._end: Timer | None = None

    def give(self, role: Role, for_s: float) -> None:
        """Take `role` for so many seconds from now, and then the own one again; with 0 it becomes the own."""
        self.close()
        own = role if not for_s else self._holder.own_role
        if role is not own:
            self._end = self._later(for_s, self._return)
        self._take(role, own)

    def close(self) -> None:
        """Stay in the role that it is."""
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def _return(self) -> None:
        self._end = None
        holder = self._holder
        log.info("nobody wants a %s worker any more: back to %s", holder.role.value, holder.own_role.value)
        self._take(holder.own_role, holder.own_role)

    def _take(self, role: Role, own: Role) -> None:
        holder = self._holder
        if (role, own) == (holder.role, holder.own_role):
            return
        holder.own_role = own
        if role is not holder.role:
            holder.become(role)
            ROLE_CHANGES.labels(role.value).inc()
        self._announce()
