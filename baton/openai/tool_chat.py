"""What the answers of /v1/chat/completions look like, whole and streamed, where they may call tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.openai.answer import Head, Piece, Usage, event
from baton.openai.chat import ChatShapes
from baton.openai.logprobs import LogprobShapes
from baton.openai.schema import ChatRequest, ChosenTool
from baton.sampling import FinishReason
from baton.text.tool_calls import Call, Content, Part, ToolCallFormat

_Delta = dict[str, Any]
_PUSHED_CHARACTERS = 1024  # of an answer that is there as a whole: what is taken from a text copies the rest


class ToolChatShapes(ChatShapes):
    """Shapes one request's answer: a piece of content, the beginning of a call and more of its arguments are
    an event each. What adds none of them is one for the sake of its log-probabilities, token ids or usage."""

    def __init__(
        self,
        request: ChatRequest,
        prompt_token_ids: Sequence[int],
        head: Head,
        names: LogprobShapes,
        calls: ToolCallFormat,
    ) -> None:
        super().__init__(request, prompt_token_ids, head, names)
        self._calls = calls
        self._readers: dict[int, _Reader] = {}

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> bytes:
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = _Reader(self._request, self._calls)
        deltas = reader.read(piece)
        events = self._opening(index) if piece.first else b""
        for delta in deltas[:-1]:
            said = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            events += self._event(said, usage)
        if deltas or piece.delta.finish_reason is not None or usage is not None or not self._only_text:
            said = reader.reasoned(self._choice(index, piece))
            said["delta"] = deltas[-1] if deltas else {}
            events += self._event(said, usage)
        return events

    def _event(self, choice: dict[str, Any], usage: Usage | None) -> bytes:
        content = self._head.object("chat.completion.chunk", [choice])
        if usage is not None:
            content["usage"] = usage.shape()
        return event(content)

    def _whole_choice(self, index: int, piece: Piece) -> dict[str, Any]:
        reader = _Reader(self._request, self._calls)
        message = _joined(reader.read(piece))
        choice = reader.reasoned(self._choice(index, piece))
        choice["message"] = {"role": "assistant", "refusal": None, **message}
        return choice


class _Reader:
    """Reads one choice: from its pieces to what OpenAI calls deltas."""

    def __init__(self, request: ChatRequest, calls: ToolCallFormat) -> None:
        self._parser = calls()
        self._most = 1 if request.parallel_tool_calls is False else None
        self._named = isinstance(request.tool_choice, ChosenTool)
        self._begun = 0

    def read(self, piece: Piece) -> list[_Delta]:
        parts: list[Part] = []
        for at in range(0, len(piece.delta.text), _PUSHED_CHARACTERS):
            parts += self._parser.push(piece.delta.text[at : at + _PUSHED_CHARACTERS])
        if piece.delta.finish_reason is not None:
            parts += self._parser.finish()
        deltas: list[_Delta] = []
        for part in parts:
            if isinstance(part, Content):
                deltas.append({"content": part.text})
                continue
            self._begun += isinstance(part, Call)
            if self._most is not None and self._begun > self._most:
                continue  # one more than the client wants
            said: _Delta = {"index": self._begun - 1}
            if isinstance(part, Call):
                said |= {"id": self._parser.new_id(), "type": "function"}
                said["function"] = {"name": part.name, "arguments": ""}
            else:
                said["function"] = {"arguments": part.text}
            deltas.append({"tool_calls": [said]})
        return deltas

    def reasoned(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice that ends with calls says so; one that had to be a certain call does not: as OpenAI's."""
        if choice["finish_reason"] == FinishReason.STOP.value and self._begun and not self._named:
            choice["finish_reason"] = "tool_calls"
        return choice


def _joined(deltas: Sequence[_Delta]) -> dict[str, Any]:
    """What a stream of these deltas amounts to."""
    content = ""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        content += delta.get("content", "")
        for said in delta.get("tool_calls", ()):
            if "id" in said:
                calls.append({key: said[key] for key in ("id", "type", "function")})
            else:
                calls[-1]["function"]["arguments"] += said["function"]["arguments"]
    if not calls:
        return {"content": content}
    return {"content": content or None, "tool_calls": calls}
