"""Whatever bytes a body has, it becomes a request or a refusal that names a field."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.grammar.constraint import Constraint
from baton.models.config import SamplingDefaults
from baton.openai.answer import error_shape
from baton.openai.params import ModelLimits, OutputBudget, settle, stops_of
from baton.openai.parse import BodyParser
from baton.openai.schema import (
    HARMLESS,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    TokenizeRequest,
)
from baton.openai.structured import constraint_of
from baton.security.keys import BadKeyFile, new_key, parse_keys
from tests.fuzz.explore import explore
from tests.fuzz.mutations import mutated

PARSERS = [BodyParser(kind) for kind in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)]
FULL = {
    "model": "m", "max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "logit_bias": {"9": -100},
    "stop": ["a", "b"], "stop_token_ids": [11], "seed": -1, "n": 2, "ignore_eos": True, "min_tokens": 2,
    "stream": True, "stream_options": {"include_usage": True}, "cache_salt": "s", "slo": "batch",
}  # fmt: skip
USER = {"role": "user", "content": [{"type": "text", "text": "Hi ☃"}], "name": "n"}
BODIES = [
    json.dumps(body).encode()
    for body in (
        {"prompt": "Hi", **FULL},
        {"prompt": ["a", [1, 2], 3], "echo": True, "logprobs": 3, "user": "u", "best_of": 2},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}], **FULL},
        {
            "messages": [USER],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        },
        {
            "prompt": "a",
            "response_format": {"type": "json_object"},
            "guided_json": {},
            "guided_choice": ["a"],
        },
        {"prompt": "a", "structured_outputs": {"json": {"type": "null"}, "disable_any_whitespace": True}},
        {"prompt": "a", "structured_outputs": {"regex": "[a-c]+", "whitespace_pattern": " ?"}, "n": 2},
        {"messages": [USER], "chat_template_kwargs": {"a": {"b": [1, 2.5, None]}}, "metadata": {"a": {}}},
        {"prompt": "Hi", "return_token_strs": True},
        {"tokens": [1, 2, 3]},
    )
]
LIMITS = ModelLimits(4096, 512, SamplingDefaults())
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY_JSON = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)
NAMES = sorted({*FULL, *HARMLESS, *UNSUPPORTED, "prompt", "messages", "tokens", "logprobs", "echo"})


def take(body: bytes) -> None:
    """Parse a body as every endpoint would, and check what came of it against a model."""
    for parser in PARSERS:
        try:
            request = parser.parse(body)
            if isinstance(request, SamplingFields):
                stops = stops_of(request)
                assert all(stops)
                if asked := constraint_of(request):
                    constraint, field = asked
                    assert Constraint.from_line(constraint.to_line(7)) == (7, constraint)
                    assert field
                budget = OutputBudget("max_tokens", request.max_tokens, 16)
                sampling = settle(request, LIMITS, prompt_tokens=9, budget=budget, logprobs=None, seed=1)
                assert 1 <= sampling.max_tokens <= 4096 - 9
                assert math.isfinite(sampling.temperature + sampling.top_p + sampling.min_p)
                assert 0 <= sampling.seed < 2**64
                assert all(0 <= token_id < 512 for token_id in sampling.logit_bias)
        except InvalidRequest as refusal:
            assert refusal.field
            assert len(refusal.message) < 10_000
            json.dumps(error_shape(refusal)).encode()


@explore(body=mutated(BODIES))
def test_bytes_become_a_request_or_a_refusal(body: bytes) -> None:
    take(body)


@explore(body=st.dictionaries(st.sampled_from(NAMES), ANY_JSON, max_size=6))
def test_any_json_becomes_a_request_or_a_refusal(body: object) -> None:
    take(json.dumps(body).encode("utf-8", "surrogatepass"))


@explore(content=mutated([json.dumps({"keys": [{"id": "a", "sha256": new_key()[1].sha256}]}).encode()]))
def test_a_file_of_keys_is_read_or_refused(content: bytes) -> None:
    try:
        keys = parse_keys(content, Path("keys.json"))
    except BadKeyFile:
        return
    assert all(len(bytes.fromhex(key.sha256)) == 32 for key in keys)
