"""What the clients ask: every kind of request that the public interfaces have, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Literal

Interface = Literal["completions", "chat", "grpc"]

_BEGINNINGS = 4
_BEGINNING_TOKENS = (48, 160)
_OWN_TOKENS = (1, 120)
_OUTPUT_TOKENS = (4, 96)
_TEXTS = (
    "import os\n\n\ndef walk(top):\n",
    "class Node:\n    def __init__(self",
    "def fibonacci(n):\n    # count up\n",
    "A list is",
    "for line in open(path):\n",
)


@dataclass(frozen=True)
class Question:
    """One request whose answer is always the same. `body` is that of the HTTP API; of gRPC the sampling is
    in it, and the prompt is token ids."""

    number: int
    interface: Interface
    stream: bool
    body: dict[str, Any] = field(hash=False)


def draw_questions(count: int, seed: int) -> list[Question]:
    """`count` questions, the same for the same seed."""
    draw = random.Random(seed)
    beginnings = [_tokens(draw, *_BEGINNING_TOKENS) for _ in range(_BEGINNINGS)]
    return [_question(number, draw, beginnings) for number in range(count)]


def _question(number: int, draw: random.Random, beginnings: list[list[int]]) -> Question:
    interface = draw.choice(("completions", "completions", "chat", "grpc"))
    body: dict[str, Any] = {"max_tokens": draw.randint(*_OUTPUT_TOKENS), **_sampling(draw)}
    prompt = draw.choice(beginnings) + _tokens(draw, *_OWN_TOKENS)
    if interface == "chat":
        messages = [{"role": "user", "content": draw.choice(_TEXTS)}]
        if draw.random() < 0.5:
            messages.insert(0, {"role": "system", "content": "Answer in Python. " * draw.randint(1, 20)})
        body["messages"] = messages
        if draw.random() < 0.4:
            body |= {"logprobs": True, "top_logprobs": draw.choice((0, 3))}
    else:
        body["prompt"] = prompt
        if interface == "completions":
            several = [prompt, draw.choice(beginnings) + _tokens(draw, 1, 30)]
            body["prompt"] = draw.choice((prompt, prompt, draw.choice(_TEXTS) * 8, several))
        if draw.random() < 0.4:
            body["logprobs"] = draw.choice((0, 2, 5))
        if interface == "grpc" and draw.random() < 0.2:
            body["prompt_logprobs"] = 1
    if draw.random() < 0.15:
        body["cache_salt"] = draw.choice(("one", "two"))
    stream = interface == "grpc" or draw.random() < 0.7
    if interface != "grpc":
        body |= {"return_token_ids": True}
        if draw.random() < 0.25:
            body["slo"] = "batch"
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Question(number, interface, stream, body)


def _sampling(draw: random.Random) -> dict[str, Any]:
    asked: dict[str, Any] = {"temperature": 0.0}
    if draw.random() < 0.6:
        asked = {"temperature": round(draw.uniform(0.5, 1.3), 2), "seed": draw.randrange(1 << 40)}
        asked |= draw.choice(
            ({}, {"top_p": 0.8}, {"top_k": 30}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9})
        )
    if draw.random() < 0.3:
        asked |= draw.choice(
            (
                {"repetition_penalty": 1.3},
                {"presence_penalty": 0.6},
                {"frequency_penalty": 0.5, "logit_bias": {"50": 2.0}},
            )
        )
    if draw.random() < 0.25:
        asked["n"] = draw.choice((2, 3))
    if draw.random() < 0.3:
        asked["stop"] = draw.sample(("\n\n", "self", " in ", "):", "return"), 2)
        asked["include_stop_str_in_output"] = draw.random() < 0.5
    if draw.random() < 0.2:
        asked["min_tokens"] = 4
    if draw.random() < 0.5:
        asked["ignore_eos"] = True
    return asked


def _tokens(draw: random.Random, least: int, most: int) -> list[int]:
    return [draw.randrange(100, 4000) for _ in range(draw.randint(least, most))]
