"""What the HTTP and gRPC fronts share: from a checked request to its choices running side by side."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

from baton import tracing
from baton.errors import BatonError
from baton.openai.answer import Piece
from baton.openai.params import ModelLimits, OutputBudget, settle, stops_of
from baton.openai.schema import SamplingFields
from baton.openai.structured import constraint_of
from baton.security.quota import Quota
from services.router.admission import Door
from services.router.caller import Caller, Callers
from services.router.generation import Generation, Placed
from services.router.lifecycle import Lifecycle
from services.router.metrics import Metrics
from services.router.model import ServedModel
from services.router.placement import Placer

EmitChoice = Callable[[int, Placed, Sequence[Piece]], Awaitable[None]]
"""Takes the pieces of all choices of a request; the first argument is the choice's index."""


@dataclass(frozen=True)
class Frontend:
    """The router's parts as a front needs them."""

    model: ServedModel
    placer: Placer
    lifecycle: Lifecycle
    door: Door
    callers: Callers
    metrics: Metrics
    tenant_isolation: bool

    def limits(self) -> ModelLimits:
        """What requests may ask for now: the model's limits, and no more than some worker can hold."""
        limits = self.model.limits
        held = self.placer.longest_context()
        if held is None or held >= limits.max_model_len:
            return limits
        return replace(limits, max_model_len=held)

    async def grammar(self, fields: SamplingFields) -> str:
        """What the answer must match, in the form that workers take; empty where any answer will do.

        Raises:
            InvalidRequest: naming the field at fault.
            Overloaded: too many others wait for the same.
        """
        asked = constraint_of(fields)
        if asked is None:
            return ""
        constraint, field = asked
        self.model.require_tokenizer(field)
        return await self.model.grammars.grammar(constraint, field)

    def generations(
        self,
        fields: SamplingFields,
        limits: ModelLimits,
        *,
        prompt_token_ids: list[int],
        caller: Caller,
        budget: OutputBudget,
        logprobs: int | None,
        request_id: str,
        cache_salt: str,
        grammar: str,
        shown_tokens: frozenset[int] = frozenset(),
    ) -> list[Generation]:
        """The n choices for one prompt. Choice i is seeded with seed + i, drawn here when not given; all keep
        to `grammar`. `shown_tokens` are part of the text although they are special.

        Raises:
            InvalidRequest: naming the field at fault.
        """
        stops = stops_of(fields)
        if stops:
            self.model.require_tokenizer("stop")
        sampling = settle(
            fields,
            limits,
            prompt_tokens=len(prompt_token_ids),
            budget=budget,
            logprobs=logprobs,
            seed=random.getrandbits(64),
            grammar=grammar,
        )
        first = Generation(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            caller=caller,
            stops=stops,
            include_stop=fields.include_stop_str_in_output or False,
            skip_special_tokens=fields.skip_special_tokens is not False,
            shown_tokens=shown_tokens,
            cache_salt=self._salt(caller, cache_salt),
        )
        others = [
            replace(first, sampling=replace(sampling, seed=(sampling.seed + index) % 2**64))
            for index in range(1, fields.n or 1)
        ]
        return [first, *others]

    async def run(self, generations: Sequence[Generation], emit: EmitChoice) -> None:
        """Run all choices to their end. When one fails, or the caller is cancelled, all are cancelled.

        Raises:
            BatonError: the first failure.
        """
        self.metrics.arrived([len(generation.prompt_token_ids) for generation in generations])
        first = generations[0]
        span = tracing.begin("request", first.caller.traceparent, first.caller.arrived_s)
        if span is None:
            await self._run(generations, emit, "")
            return
        failure = "cancelled"
        try:
            await self._run(generations, emit, tracing.traceparent(span))
            failure = ""
        except BatonError as error:
            failure = error.openai_type
            raise
        finally:
            facts: tracing.Attributes = {
                "request_id": first.request_id,
                "choices": len(generations),
                "error": failure,
            }
            tracing.end(span, time.monotonic(), facts, failed=bool(failure))

    async def _run(self, generations: Sequence[Generation], emit: EmitChoice, trace: str) -> None:
        quota = generations[0].caller.quota
        if quota is not None and quota.counts_tokens:
            quota.require_tokens(time.monotonic())
            emit = _counted(emit, quota)
        async with self._admitted(generations) as queue_s:
            if quota is not None:
                quota.take_tokens(_prompt_tokens(generations))
            if len(generations) == 1:
                await self.lifecycle.run(
                    generations[0],
                    lambda placed, pieces: emit(0, placed, pieces),
                    queue_s=queue_s,
                    trace=trace,
                )
                return
            try:
                async with asyncio.TaskGroup() as tasks:
                    leaders: dict[int, asyncio.Event] = {}
                    for index, generation in enumerate(generations):
                        prompt = id(generation.prompt_token_ids)
                        leader = leaders.get(prompt)
                        begun = leaders.setdefault(prompt, asyncio.Event())
                        tasks.create_task(
                            self._run_one(index, generation, emit, leader, begun, queue_s, trace)
                        )
            except* BatonError as group:
                raise _first(group) from None

    async def _run_one(
        self,
        index: int,
        generation: Generation,
        emit: EmitChoice,
        leader: asyncio.Event | None,
        begun: asyncio.Event,
        queue_s: float,
        trace: str,
    ) -> None:
        """Run a choice, but not before `leader`, the first choice of the same prompt, has a token: then
        the prompt's KV is there and need not be computed once per choice."""
        if leader is not None:
            await leader.wait()

        async def emit_one(placed: Placed, pieces: Sequence[Piece]) -> None:
            begun.set()
            await emit(index, placed, pieces)

        await self.lifecycle.run(generation, emit_one, queue_s=queue_s, trace=trace)

    def _admitted(self, generations: Sequence[Generation]) -> AbstractAsyncContextManager[float]:
        """The choices' places; their prompts count once each, their outputs as long as outputs are now."""
        output_tokens = min(generations[0].sampling.max_tokens, self.lifecycle.mean_output_tokens)
        return self.door.admitted(
            generations[0].caller,
            len(generations),
            prompt_tokens=_prompt_tokens(generations),
            output_tokens=output_tokens * len(generations),
        )

    def _salt(self, caller: Caller, cache_salt: str) -> str:
        """The salt of the prompt's blocks; where tenants are kept apart, no two tenants share one."""
        if not self.tenant_isolation:
            return cache_salt
        return f"{len(caller.tenant)}:{caller.tenant}{cache_salt}"


def _prompt_tokens(generations: Sequence[Generation]) -> int:
    """Tokens of all prompts; one that several choices share counts once."""
    prompts = {id(generation.prompt_token_ids): generation.prompt_token_ids for generation in generations}
    return sum(map(len, prompts.values()))


def _counted(emit: EmitChoice, quota: Quota) -> EmitChoice:
    """As `emit`, and every token of an answer counts against the quota."""

    async def count_and_emit(index: int, placed: Placed, pieces: Sequence[Piece]) -> None:
        quota.take_tokens(sum(len(piece.delta.token_ids) for piece in pieces))
        await emit(index, placed, pieces)

    return count_and_emit


def _first(group: BaseExceptionGroup[BatonError]) -> BatonError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
