"""What the answers of /v1/chat/completions look like, whole and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.openai.answer import Head, Piece, TextEvent, Usage, event, join
from baton.openai.logprobs import LogprobShapes
from baton.openai.schema import ChatRequest
from baton.text.output import Delta


class ChatShapes:
    """Shapes one request's answer."""

    def __init__(
        self, request: ChatRequest, prompt_token_ids: Sequence[int], head: Head, names: LogprobShapes
    ) -> None:
        self._request = request
        self._prompt_token_ids = prompt_token_ids
        self._head = head
        self._names = names
        self._only_text = not request.logprobs and not request.return_token_ids
        self._text_events: dict[int, TextEvent] = {}

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> bytes:
        """The events for one piece of choice `index`; `usage` where every chunk carries it."""
        in_the_middle = not piece.first and piece.delta.finish_reason is None
        if in_the_middle and self._only_text and usage is None:
            return self._text_event(index).with_text(piece.delta.text)
        content = self._content(index, piece)
        if usage is not None:
            content["usage"] = usage.shape()
        if not piece.first:
            return event(content)
        return self._opening(index) + event(content)

    def _opening(self, index: int) -> bytes:
        """The event that a choice begins with."""
        opening: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        start = self._head.object("chat.completion.chunk", [opening])
        if self._request.return_token_ids:
            start["prompt_token_ids"] = list(self._prompt_token_ids)
        return event(start)

    def _content(self, index: int, piece: Piece) -> dict[str, Any]:
        choice = self._choice(index, piece)
        choice["delta"] = {"content": piece.delta.text}
        return self._head.object("chat.completion.chunk", [choice])

    def _text_event(self, index: int) -> TextEvent:
        events = self._text_events.get(index)
        if events is None:
            piece = Piece(Delta(TextEvent.PLACE, ()), first=False)
            events = self._text_events[index] = TextEvent(self._content(index, piece))
        return events

    def usage_chunk(self, usage: Usage) -> bytes:
        return event({**self._head.object("chat.completion.chunk", []), "usage": usage.shape()})

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed, from every choice's pieces."""
        request = self._request
        joined = [join(pieces) for pieces in choices]
        shaped = [self._whole_choice(index, piece) for index, piece in enumerate(joined)]
        content = {**self._head.object("chat.completion", shaped), "usage": usage.shape()}
        if request.return_token_ids:
            content["prompt_token_ids"] = list(self._prompt_token_ids)
        if request.prompt_logprobs is not None:
            content["prompt_logprobs"] = self._names.prompt(
                joined[0].prompt_logprobs, request.prompt_logprobs
            )
        return content

    def _whole_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        choice = self._choice(index, piece)
        choice["message"] = {"role": "assistant", "content": piece.delta.text, "refusal": None}
        return choice

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        request, delta = self._request, piece.delta
        shape: dict[str, Any] = {
            "index": index,
            "logprobs": None,
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
            "stop_reason": delta.stop_reason,
        }
        if request.logprobs:
            shape["logprobs"] = self._names.chat(delta.logprobs, request.top_logprobs or 0)
        if request.return_token_ids:
            shape["token_ids"] = list(delta.token_ids)
        return shape
