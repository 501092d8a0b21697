"""What one choice has said so far, as text: tokens in, pieces of text and the reason to stop out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from baton.rpc.v1 import inference_pb2
from baton.sampling import FinishReason
from baton.text.detokenizer import Detokenizer
from baton.text.stops import StopMatcher

_Logprobs = Sequence[inference_pb2.PositionLogprobs]


class Delta(NamedTuple):
    """What a choice gained in one step.

    `logprobs` has one entry per token id, or none. The text may lag behind the tokens: it is whole
    characters only, and what may be the beginning of a stop string waits. `stop_reason` is the stop
    string or stop token id that ended the choice; None for end-of-sequence and other endings.
    """

    text: str
    token_ids: Sequence[int]
    logprobs: _Logprobs = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class ChoiceText:
    """Turns one choice's tokens into deltas.

    Stop strings are not looked for before `min_tokens` tokens; text from before is never cut.
    """

    def __init__(
        self, detokenizer: Detokenizer, *, stops: Sequence[str], include_stop: bool, min_tokens: int
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops, include_stop=include_stop) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self.tokens = 0

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: _Logprobs = (),
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
        *,
        complete: bool = False,
    ) -> Delta:
        """What these tokens add.

        The delta has a finish reason when the engine gave one or a stop string is complete; then
        tokens after the one that completed it are dropped. The token that ended the choice, when
        the engine stopped on one, is counted but not shown unless stop strings are to be included; where the
        engine stopped because the answer is `complete`, there is no such token.
        """
        shown = len(token_ids)
        if finish_reason is FinishReason.STOP and not complete and not self._include_stop:
            shown -= 1
        push_token = self._detokenizer.push
        if self._matcher is None:
            self.tokens += len(token_ids)
            text = "".join([push_token(token_id) for token_id in token_ids[:shown]])
            if finish_reason is None:
                return Delta(text, token_ids, logprobs)
            return self._finish(text, token_ids, logprobs, finish_reason, stop_token_id)
        pieces = []
        for at, token_id in enumerate(token_ids):
            self.tokens += 1
            piece = push_token(token_id) if at < shown else ""
            if self.tokens < self._min_tokens:
                pieces.append(piece)
                continue
            piece, stop = self._matcher.push(piece)
            pieces.append(piece)
            if stop is not None:
                kept = at + 1
                return Delta("".join(pieces), token_ids[:kept], logprobs[:kept], FinishReason.STOP, stop)
        if finish_reason is None:
            return Delta("".join(pieces), token_ids, logprobs)
        return self._finish("".join(pieces), token_ids, logprobs, finish_reason, stop_token_id)

    def _finish(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: _Logprobs,
        finish_reason: FinishReason,
        stop_token_id: int | None,
    ) -> Delta:
        rest = self._detokenizer.flush()
        ended = Delta(text + rest, token_ids, logprobs, finish_reason, stop_token_id)
        if self._matcher is None:
            return ended
        # The last incomplete character may still complete a stop string.
        rest, stop = self._matcher.push(rest)
        if stop is not None:
            return ended._replace(text=text + rest, finish_reason=FinishReason.STOP, stop_reason=stop)
        return ended._replace(text=text + rest + self._matcher.flush())
