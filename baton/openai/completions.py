"""What the answers of /v1/completions look like, whole and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.openai.answer import Head, Piece, TextEvent, Usage, event, join
from baton.openai.logprobs import LogprobShapes
from baton.openai.schema import CompletionRequest
from baton.rpc.v1 import inference_pb2
from baton.text.output import Delta


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt as echo shows it."""

    text: str
    token_ids: Sequence[int]


class CompletionShapes:
    """Shapes one request's answer. The pieces of a choice must come in order."""

    def __init__(
        self, request: CompletionRequest, prompts: Sequence[EchoedPrompt], head: Head, names: LogprobShapes
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._head = head
        self._names = names
        self._per_prompt = request.n or 1
        self._offsets = [0] * (len(prompts) * self._per_prompt)
        self._only_text = (
            request.logprobs is None and not request.return_token_ids and request.prompt_logprobs is None
        )
        self._text_events: dict[int, TextEvent] = {}

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> bytes:
        """The event for one piece of choice `index`; `usage` where every chunk carries it."""
        in_the_middle = not piece.first and piece.delta.finish_reason is None
        if in_the_middle and self._only_text and usage is None:
            return self._text_event(index).with_text(piece.delta.text)
        content = self._head.object("text_completion", [self._choice(index, piece)])
        if usage is not None:
            content["usage"] = usage.shape()
        return event(content)

    def _text_event(self, index: int) -> TextEvent:
        events = self._text_events.get(index)
        if events is None:
            choice = self._choice(index, Piece(Delta(TextEvent.PLACE, ()), first=False))
            events = self._text_events[index] = TextEvent(self._head.object("text_completion", [choice]))
        return events

    def usage_chunk(self, usage: Usage) -> bytes:
        return event({**self._head.object("text_completion", []), "usage": usage.shape()})

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed, from every choice's pieces."""
        shaped = [self._choice(index, join(pieces)) for index, pieces in enumerate(choices)]
        return {**self._head.object("text_completion", shaped), "usage": usage.shape()}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        request, delta = self._request, piece.delta
        prompt = self._prompts[index // self._per_prompt]
        echoed = piece.first and request.echo
        shape: dict[str, Any] = {
            "index": index,
            "text": prompt.text + delta.text if echoed else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
            "stop_reason": delta.stop_reason,
        }
        if request.logprobs is not None:
            token_ids: Sequence[int] = delta.token_ids
            positions: Sequence[inference_pb2.PositionLogprobs | None] = delta.logprobs
            if echoed:
                token_ids = [*prompt.token_ids, *token_ids]
                positions = [None, *piece.prompt_logprobs, *positions]
            shape["logprobs"], self._offsets[index] = self._names.completion(
                token_ids, positions, request.logprobs, self._offsets[index]
            )
        if request.return_token_ids:
            shape["token_ids"] = list(delta.token_ids)
            shape["prompt_token_ids"] = list(prompt.token_ids) if piece.first else None
        if request.prompt_logprobs is not None and piece.first:
            shape["prompt_logprobs"] = self._names.prompt(piece.prompt_logprobs, request.prompt_logprobs)
        return shape
