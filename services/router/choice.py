"""What one choice has said so far, and how it goes on: from workers' outputs to pieces for its client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy

from baton.errors import Unavailable
from baton.openai.answer import Piece
from baton.routing import Placement, PullSource
from baton.routing.attempts import SESSION_BROKEN
from baton.rpc.v1 import inference_pb2, worker_pb2
from baton.sampling import FinishReason, Sampling
from baton.text import ChoiceText, Detokenizer, Tokenizer
from services.router.failures import PlacementFailed, failed
from services.router.generation import Emit, Generation, Placed
from services.router.moves import Leg, Move, Workers
from services.router.placement import Hold
from services.router.poison import Trial
from services.router.sessions import ClientTooSlow, SessionBroken
from services.router.timeline import Recent, Timeline

_SHORTEST_S = 0.001

_FINISHED: dict[int, FinishReason | None] = {
    inference_pb2.FINISH_REASON_UNSPECIFIED: None,
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_KINDS = {
    worker_pb2.PrefillReport.REMOTE: "remote",
    worker_pb2.PrefillReport.LOCAL: "local",
    worker_pb2.PrefillReport.CACHED: "cached",
}


class Choice:
    """The state of one choice that outlives its placements."""

    def __init__(
        self,
        generation: Generation,
        emit: Emit,
        timeline: Timeline,
        workers: Workers,
        tokenizer: Tokenizer | None,
        recent: Recent,
        policy: str,
    ) -> None:
        self._metrics = workers.metrics
        self._recent = recent
        self._timeline = timeline
        self._placer = workers.placer
        self._workers = workers
        self._policy = policy
        self._generation = generation
        self._emit = emit
        detokenizer = Detokenizer.create(
            tokenizer,
            generation.prompt_token_ids,
            skip_special_tokens=generation.skip_special_tokens,
            shown=generation.shown_tokens,
        )
        self._text = ChoiceText(
            detokenizer,
            stops=generation.stops,
            include_stop=generation.include_stop,
            min_tokens=generation.sampling.min_tokens,
        )
        self._wants_logprobs = generation.sampling.logprobs is not None
        self.output: list[int] = []
        self.trial: Trial | None = None
        self._placed: Placed | None = None
        self._prompt_logprobs: list[inference_pb2.PositionLogprobs] = []

    @property
    def tokens(self) -> int:
        """Tokens generated so far, less those after a stop string."""
        return self._text.tokens

    async def follow(self, hold: Hold) -> None:
        """Start the rest of the choice where `hold` says, and emit what comes until it ends.

        Raises:
            PlacementFailed: it ended early.
        """
        placement = hold.placement
        worker_id = placement.decode.worker_id
        if not self.output:
            self._note_start(placement)
        self._timeline.placements += 1
        try:
            leg: Leg | None = Leg(hold, self._workers.sessions, self._start, self._generation.prompt_key)
            while leg is not None:
                worker_id = leg.worker_id
                with leg:
                    leg = await self._follow_leg(leg)
        except SessionBroken as error:
            final = Unavailable(str(error))
            raise PlacementFailed(SESSION_BROKEN, worker_id, final, error.loss) from error
        except ClientTooSlow as error:
            raise Unavailable(f"the client reads too slowly: {error}") from error

    async def _follow_leg(self, leg: Leg) -> Leg | None:
        """Emit what comes until the choice has ended, or goes on at the leg that is returned.

        Raises:
            PlacementFailed, SessionBroken: it ended early.
        """
        while not leg.attempt.draining:
            if await self._advance(await leg.attempt.outputs(), leg.hold):
                return None
        async with Move(leg, self._generation, self.output, self._start, self._workers) as move:
            try:
                while not await self._advance(await leg.attempt.outputs(), leg.hold):
                    pass
                return None
            except (SessionBroken, PlacementFailed) as left:
                if isinstance(left, PlacementFailed) and left.reason != "moved":
                    raise
                if (next_leg := await move.next_leg()) is None:
                    raise
                return next_leg

    async def _advance(self, outputs: Sequence[worker_pb2.RequestOutput], hold: Hold) -> bool:
        """Emit together what came together; whether the choice has ended.

        Raises:
            PlacementFailed: it ended early, in the middle of `outputs` or before.
        """
        pieces: list[Piece] = []
        failure: Exception | None = None
        now_s = time.monotonic()
        for output in outputs:
            failure = failed(output, hold.placement)
            if failure is not None:
                break
            if output.HasField("prefill"):
                hold.release()
                self._note_prefill(output.prefill, hold)
            if output.HasField("transfer"):
                self._note_transfer(output.transfer, hold.placement)
            piece = self._take(output, hold.placement, now_s)
            if piece is not None:
                pieces.append(piece)
                if piece.delta.finish_reason is not None:
                    break
        if pieces:
            assert self._placed is not None
            await self._emit(self._placed, pieces)
            if self.trial is not None:
                self.trial.progress(len(self.output))
        if failure is not None:
            raise failure
        return bool(pieces) and pieces[-1].delta.finish_reason is not None

    def _start(self, placement: Placement) -> worker_pb2.Start:
        """The rest of the choice for the placement's workers."""
        generation, prefill = self._generation, placement.prefill
        deadline_s = generation.caller.arrived_s + generation.caller.timeout_s
        return worker_pb2.Start(
            request_id=generation.request_id,
            prompt_token_ids=generation.prompt_token_ids,
            output_token_ids=self.output,
            sampling=_sampling_message(generation.sampling),
            cache_salt=generation.cache_salt,
            prefill_address=prefill.address if prefill is not None else "",
            prefill_incarnation=prefill.incarnation if prefill is not None else "",
            pull=None if placement.pull is None else _pull_message(placement.pull),
            traceparent=self._timeline.trace,
            timeout_s=max(_SHORTEST_S, deadline_s - time.monotonic()),
        )

    def _take(self, output: worker_pb2.RequestOutput, placement: Placement, now_s: float) -> Piece | None:
        """What one step's output adds, if anything. Runs once per token: keep it lean."""
        tokens = output.token_ids[:]
        finished = _FINISHED[output.finish_reason]
        first = not self.output
        if first:
            self._prompt_logprobs.extend(output.prompt_logprobs)
            if self._placed is None:
                self._note_placed("local", 0, placement)
        if not tokens and finished is None:
            return None
        stop_token_id = output.stop_token_id if finished and output.stopped_by_token_id else None
        logprobs = output.logprobs if self._wants_logprobs else ()
        delta = self._text.push(tokens, logprobs, finished, stop_token_id, complete=output.complete)
        self.output += tokens
        self._observe(len(tokens), first, now_s)
        if delta.finish_reason is not None:
            self._timeline.outcome = delta.finish_reason.value
        return Piece(delta, first, self._prompt_logprobs if first else ())

    def _note_start(self, placement: Placement) -> None:
        timeline = self._timeline
        timeline.placed_s = time.monotonic()
        timeline.predicted_s = placement.terms.first_token_s
        timeline.decode_worker = placement.decode.worker_id
        timeline.computing_worker = placement.computing.worker_id
        timeline.pull_worker = placement.pull.worker.worker_id if placement.pull is not None else ""

    def _note_transfer(self, report: worker_pb2.TransferReport, placement: Placement) -> None:
        self._timeline.transfer = deepcopy(report)  # a part of a message would keep all of it in memory
        if placement.prefill is not None:
            self._recent.moved(placement.prefill.worker_id, placement.decode.worker_id, report.bytes)

    def _note_prefill(self, report: worker_pb2.PrefillReport, hold: Hold) -> None:
        placement = hold.placement
        self._placer.on_prefill(hold, report)
        actual_s = report.queue_s + report.prefill_s
        self._metrics.predicted(placement.terms.first_token_s, actual_s)
        kind = _KINDS.get(report.kind, "local")
        self._timeline.prefill, self._timeline.kind = deepcopy(report), kind
        if placement.pull is not None and report.pulled_tokens:
            size = report.pulled_tokens * self._placer.kv_bytes_per_token(placement.computing.worker_id)
            self._recent.moved(placement.pull.worker.worker_id, placement.computing.worker_id, size)
        self._metrics.placed(kind, self._policy)
        if self._placed is None:
            self._note_placed(kind, report.cached_tokens, placement)

    def _note_placed(self, kind: str, cached_tokens: int, placement: Placement) -> None:
        remote = placement.prefill is not None and kind == "remote"
        self._placed = Placed(
            kind,
            placement.decode.worker_id,
            placement.prefill.worker_id if remote and placement.prefill else "",
            cached_tokens,
            placement.terms.first_token_s,
            self._timeline.queue_s,
        )

    def _observe(self, tokens: int, first: bool, now_s: float) -> None:
        timeline = self._timeline
        if first:
            timeline.first_s = now_s
            self._metrics.first_token.observe(now_s - timeline.arrived_s)
            self._metrics.prompt_tokens.inc(timeline.prompt_tokens)
            self._recent.prompt_tokens += timeline.prompt_tokens
        elif tokens:
            self._metrics.interval.observe((now_s - timeline.last_s) / tokens, tokens)
        timeline.output_tokens += tokens
        self._recent.output_tokens += tokens
        timeline.last_s = now_s


def _pull_message(pull: PullSource) -> worker_pb2.Pull:
    return worker_pb2.Pull(
        address=pull.worker.address, incarnation=pull.worker.incarnation, blocks=pull.blocks
    )


def _sampling_message(sampling: Sampling) -> worker_pb2.Sampling:
    return worker_pb2.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
        stop_token_ids=sampling.stop_token_ids,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        grammar=sampling.grammar,
    )
