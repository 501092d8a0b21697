"""What every OpenAI-shaped answer has in common: its head, its usage, its events, its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from baton.errors import (
    BatonError,
    ContextLengthExceeded,
    DeadlineExceeded,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    RequestTooLarge,
    Unauthenticated,
    Unavailable,
)
from baton.rpc.v1 import inference_pb2
from baton.text.output import Delta

DONE = b"data: [DONE]\n\n"

_CODES: tuple[tuple[type[BatonError], str], ...] = (
    (ContextLengthExceeded, "context_length_exceeded"),
    (ModelNotFound, "model_not_found"),
    (RequestTooLarge, "request_too_large"),
    (Unauthenticated, "invalid_api_key"),
    (PermissionDenied, "permission_denied"),
    (Overloaded, "rate_limit_exceeded"),
    (Unavailable, "service_unavailable"),
    (DeadlineExceeded, "timeout"),
)


@dataclass(frozen=True, slots=True)
class Head:
    """What every piece of one answer repeats. `created` is Unix seconds."""

    id: str
    created: int
    model: str
    fingerprint: str

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: every prompt once, the outputs of all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def shape(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Piece(NamedTuple):
    """A delta as a front sends it on: with what only a choice's first piece has.

    `prompt_logprobs` has one entry per prompt token after the first.
    """

    delta: Delta
    first: bool
    prompt_logprobs: Sequence[inference_pb2.PositionLogprobs] = ()


def join(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a finished choice as one."""
    if len(pieces) == 1:
        return pieces[0]
    deltas = [piece.delta for piece in pieces]
    last = deltas[-1]
    whole = Delta(
        "".join([delta.text for delta in deltas]),
        [token_id for delta in deltas for token_id in delta.token_ids],
        [at for delta in deltas for at in delta.logprobs],
        last.finish_reason,
        last.stop_reason,
    )
    return Piece(whole, True, pieces[0].prompt_logprobs)


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class TextEvent:
    """Events that differ in one text, which is all that is encoded for each: most of a stream is such."""

    # Encoded, it looks like nothing else in an event.
    PLACE = "\0"

    def __init__(self, content: object) -> None:
        """`content` has `PLACE` where the text goes, once."""
        self._before, self._after = event(content).split(orjson.dumps(self.PLACE))

    def with_text(self, text: str) -> bytes:
        return b"%b%b%b" % (self._before, orjson.dumps(text), self._after)


def error_shape(error: BatonError) -> dict[str, Any]:
    """OpenAI's error object."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    return {
        "error": {"message": error.message, "type": error.openai_type, "param": error.field, "code": code}
    }
