"""The quick way to write an event in the middle of a stream says what the full one would."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.openai.answer import Head, Piece
from baton.openai.chat import ChatShapes
from baton.openai.completions import CompletionShapes, EchoedPrompt
from baton.openai.logprobs import LogprobShapes
from baton.openai.schema import ChatRequest, CompletionRequest, Message
from baton.text import Delta

HEAD = Head("id-1", 1, 'a "model" ü', "baton")
NAMES = LogprobShapes(None, as_token_ids=True)


def completion(*, token_ids: bool) -> CompletionShapes:
    request = CompletionRequest(prompt="p", n=2, return_token_ids=token_ids)
    return CompletionShapes(request, [EchoedPrompt("p", [1])], HEAD, NAMES)


def chat(*, token_ids: bool) -> ChatShapes:
    request = ChatRequest(messages=[Message(role="user", content="p")], return_token_ids=token_ids)
    return ChatShapes(request, [1], HEAD, NAMES)


def said(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
    content: dict[str, Any] = json.loads(event[6:])
    for choice in content["choices"]:
        choice.pop("token_ids", None)
        choice.pop("prompt_token_ids", None)
    return content


@pytest.mark.parametrize("shapes", [completion, chat])
@given(texts=st.lists(st.text(st.characters(codec="utf-8")) | st.just('\0"\\\n'), max_size=4))
def test_events_say_the_same(shapes: Any, texts: list[str]) -> None:
    quick, full = shapes(token_ids=False), shapes(token_ids=True)
    for text in texts:
        for index in (0, 1):
            piece = Piece(Delta(text, [7]), first=False)
            assert said(quick.chunk(index, piece, None)) == said(full.chunk(index, piece, None))
