"""One choice from its first placement to its last token, across every failure in between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from baton.routing import Unplaceable
from baton.routing.attempts import SESSION_BROKEN, Attempts
from baton.text import Tokenizer
from services.router.choice import Choice
from services.router.failures import PlacementFailed
from services.router.generation import Emit, Generation
from services.router.metrics import Metrics
from services.router.moves import Workers
from services.router.placement import Hold, Placer
from services.router.poison import Loss, Poison
from services.router.sessions import SessionPool
from services.router.timeline import Recent, Timeline

log = logging.getLogger(__name__)

# How long outputs are expected to be: at first, and how much the newest one changes that.
_FIRST_GUESS_TOKENS = 256.0
_NEWEST_WEIGHT = 0.02

# What ends placements on a worker that cannot be reached or read from.
_BREAKS = frozenset({"handoff_failed", SESSION_BROKEN})


class ClusterChanges:
    """Lets requests wait until the set of reachable workers changes."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        changed, self._event = self._event, asyncio.Event()
        changed.set()

    async def wait(self) -> None:
        await self._event.wait()


class Lifecycle:
    """Runs choices. One per router."""

    def __init__(
        self,
        placer: Placer,
        sessions: SessionPool,
        changes: ClusterChanges,
        tokenizer: Tokenizer | None,
        metrics: Metrics,
        recent: Recent,
        *,
        policy: str,
        max_placements: int,
    ) -> None:
        self._placer = placer
        self._workers = Workers(placer, sessions, changes.wait, metrics)
        self._changes = changes
        self._poison = Poison(placer.is_live, changes.wait)
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._recent = recent
        self._policy = policy
        self._max_placements = max_placements
        self._mean_output_tokens = _FIRST_GUESS_TOKENS

    @property
    def mean_output_tokens(self) -> int:
        """Tokens that a choice has had lately, on average."""
        return round(self._mean_output_tokens)

    async def run(self, generation: Generation, emit: Emit, *, queue_s: float, trace: str) -> None:
        """Generate and emit every piece of the choice. Cancelling the caller cancels the work everywhere.

        `queue_s` are the seconds for which the request waited to be let in, `trace` is its traceparent, empty
        when it is not traced.

        Raises:
            InvalidRequest: no worker could ever run it.
            Overloaded, Unavailable: no worker would take it, or none of `max_placements` finished it.
        """
        timeline = Timeline(
            generation.request_id,
            generation.caller.slo,
            len(generation.prompt_token_ids),
            generation.caller.arrived_s,
            generation.tokenized_s,
            queue_s,
            trace,
        )
        choice = Choice(
            generation, emit, timeline, self._workers, self._tokenizer, self._recent, self._policy
        )
        self._recent.begin(timeline)
        try:
            await self._follow(choice, generation)
        except BaseException as error:
            timeline.outcome = timeline.outcome or type(error).__name__
            raise
        finally:
            timeline.output_tokens = choice.tokens
            self._recent.end(timeline)
            timeline.record()
            self._metrics.ended(timeline, good=self._recent.targets.met(timeline))
            self._mean_output_tokens += _NEWEST_WEIGHT * (choice.tokens - self._mean_output_tokens)

    async def _follow(self, choice: Choice, generation: Generation) -> None:
        """From placement to placement until the choice has ended, or too many brought nothing in a row."""
        clock = asyncio.get_running_loop().time
        attempts = Attempts(self._max_placements, clock())
        losses: list[Loss] = []
        while True:
            begun_at = len(choice.output)
            try:
                async with self._poison.trial(generation.prompt_key, begun_at, losses) as choice.trial:
                    await choice.follow(await self._place(generation, choice.output, attempts))
                return
            except PlacementFailed as failure:
                log.warning("request %s: %s", generation.request_id, failure)
                if failure.avoid and failure.reason in _BREAKS and self._placer.suspects.broke(failure.avoid):
                    self._metrics.backed_off(failure.reason)
                tokens = len(choice.output) - begun_at
                if tokens:
                    losses.clear()
                if failure.loss is not None:
                    losses.append(failure.loss)
                broke = failure.reason == SESSION_BROKEN
                if not attempts.failed(failure.avoid, tokens, clock(), broke=broke):
                    raise failure.final from failure
                self._metrics.replaced(failure.reason)

    async def _place(self, generation: Generation, output: Sequence[int], attempts: Attempts) -> Hold:
        """The next placement, as soon as there is one: it may wait for the cluster to change."""
        deadline_s = asyncio.get_running_loop().time() + attempts.wait_s
        while True:
            unplaceable: Unplaceable | None = None
            for avoid in attempts.avoiding:
                try:
                    return self._placer.place(generation, output, avoid)
                except Unplaceable as error:
                    unplaceable = unplaceable or error
            assert unplaceable is not None
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._changes.wait()
            except TimeoutError:
                raise unplaceable from None
