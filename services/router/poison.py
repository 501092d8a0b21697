"""Which requests take the workers down that run them, and what becomes of those.

A worker's death says little: every request that ran there has no worker now, and replaying them all at once
is what their clients want. Two deaths in a row without a new token in between say more. If the request is
all that was there both times, it is not tried again. If others were, too, they are tried one at a time, each
until it has two new tokens: whoever is innocent goes on after a moment, and who is not shows it. Who has gone
on is suspected no longer: it covers no suspect that has been tried, though it runs beside it everywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from baton.errors import DeadlyRequest

# A prompt computed and a step decoded: past what it died of, or died in, before.
_PASSED_TOKENS = 2
# For the registry to notice that a worker is gone.
_NOTICED_S = 3.0


@dataclass(frozen=True)
class Loss:
    """A session that broke, and what ran on it: the keys of this router's prompts. `alone`: no other router's
    requests were there, by the worker's last word. `acquitted` are prompts that have gone on since."""

    worker_id: str
    incarnation: str
    prompts: frozenset[int]
    alone: bool
    acquitted: set[int] = field(default_factory=set)


class Trial:
    """A placement of a suspect. While it lasts no other suspect is placed."""

    def __init__(self, prompt: int, output_tokens: int, deaths: Sequence[Loss], lock: asyncio.Lock) -> None:
        self._prompt = prompt
        self._passed_at = output_tokens + _PASSED_TOKENS
        self._deaths = deaths
        self._lock = lock
        self._over = False

    def progress(self, output_tokens: int) -> None:
        """The choice has so many tokens now."""
        if output_tokens >= self._passed_at:
            for death in self._deaths:
                death.acquitted.add(self._prompt)
            self.end()

    def end(self) -> None:
        if not self._over:
            self._over = True
            self._lock.release()


class Poison:
    """Judges requests by the losses they were part of. One per router."""

    def __init__(self, is_live: Callable[[str, str], bool], changed: Callable[[], Awaitable[None]]) -> None:
        """`is_live` says whether the registry has this incarnation of a worker; `changed` returns when it may
        say something else."""
        self._is_live = is_live
        self._changed = changed
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def trial(
        self, prompt: int, output_tokens: int, losses: Sequence[Loss]
    ) -> AsyncIterator[Trial | None]:
        """Around another placement of a choice of `prompt`, after `losses` without a new token in between.

        Raises:
            DeadlyRequest: it is not to be placed again.
        """
        if len(losses) < 2:
            yield None
            return
        deaths = await self._deaths(losses)
        if len(deaths) < 2:
            yield None
            return
        if is_guilty(prompt, deaths):
            raise DeadlyRequest(
                f"workers {deaths[-2].worker_id} and {deaths[-1].worker_id} died, one after the other, while "
                "they computed this request; it is not tried again"
            )
        await self._one_at_a_time.acquire()
        trial = Trial(prompt, output_tokens, deaths, self._one_at_a_time)
        try:
            yield trial
        finally:
            trial.end()

    async def _deaths(self, losses: Sequence[Loss]) -> list[Loss]:
        """Those of the losses whose worker is gone, and not just the connection to it."""

        def live() -> list[Loss]:
            return [loss for loss in losses if self._is_live(loss.worker_id, loss.incarnation)]

        with suppress(TimeoutError):
            async with asyncio.timeout(_NOTICED_S):
                while live():
                    await self._changed()
        return [loss for loss in losses if loss not in live()]


def is_guilty(prompt: int, deaths: Sequence[Loss]) -> bool:
    """Whether `prompt` is all that the deaths have in common; of those it has been tried since, all that has
    not gone on. Other routers' requests are not known by name, so at least once there must have been none."""
    common = frozenset.intersection(*(death.prompts for death in deaths))
    if len(deaths) > 2:
        common -= set[int]().union(*(death.acquitted for death in deaths))
    return common <= {prompt} and any(death.alone for death in deaths)
