"""Structured outputs as clients of other servers ask for them: whatever the model, the answer fits."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any, Literal

import grpc
import httpx
import psutil
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.live_streams import Body, bodies, streams

MODEL = "baton-small"
MESSAGES = [{"role": "user", "content": "Tell me about the book."}]
PHONE = r"\+[0-9]{2} [0-9]{3}-[0-9]{4}"
# Long enough that a worker can be killed in the middle of it.
NUMBER = {"type": "integer", "minimum": 100_000, "maximum": 999_999}
LONG: Body = {
    "json": {"type": "array", "items": NUMBER, "minItems": 40, "maxItems": 40},
    "disable_any_whitespace": True,
}


class Chapter(BaseModel):
    title: str = Field(max_length=12)
    pages: int = Field(ge=1, le=400)


class Book(BaseModel):
    title: str = Field(max_length=20)
    kind: Literal["novel", "essay"]
    chapters: list[Chapter] = Field(min_length=1, max_length=2)


@pytest.fixture(scope="module")
def up(start_cluster: StartCluster) -> Iterator[Cluster]:
    """Prefills remotely whatever the curves predict; the steps of its workers overlap."""
    with start_cluster("--decode", "2", "--policy", "round-robin", "--overlap", "on") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(up: Cluster) -> OpenAI:
    return OpenAI(base_url=f"{up.base_url}/v1", api_key="unused", max_retries=0)


def test_the_openai_client_parses_what_it_gets(client: OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Book, seed=seed, max_completion_tokens=2000
        )
        choice = answer.choices[0]
        assert isinstance(choice.message.parsed, Book)
        assert choice.finish_reason == "stop"


def test_streamed_chats_and_several_choices(client: OpenAI) -> None:
    schema = {"name": "book", "schema": Book.model_json_schema(), "strict": True}
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": schema},
        temperature=1.5,
        seed=4,
        n=3,
        stream=True,
    )
    texts, reasons = ["", "", ""], set()
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons.add(choice.finish_reason)
    assert len({Book.model_validate_json(text).model_dump_json() for text in texts}) == 3
    assert reasons == {None, "stop"}


@pytest.mark.parametrize(
    ("field", "constraint", "pattern"),
    [
        ("structured_outputs", {"regex": PHONE}, PHONE),
        ("structured_outputs", {"choice": ["positive", "negative"]}, "positive|negative"),
        ("structured_outputs", {"grammar": 'root ::= "SELECT " [a-z]{1,4} ("," [a-z])? ";"'}, r"SELECT .+;"),
        ("structured_outputs", {"json": {"const": "x"}, "disable_any_whitespace": True}, '"x"'),
        ("structured_outputs", {"json": '{"enum": [1, 22]}'}, "1|22"),
        ("guided_regex", PHONE, PHONE),
        ("guided_choice", ["a", "b"], "a|b"),
        ("guided_json", {"type": "boolean"}, "true|false"),
    ],
)
def test_vllms_fields(client: OpenAI, field: str, constraint: Any, pattern: str) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="def f(x):", max_tokens=200, temperature=2, extra_body={field: constraint}
    )
    assert re.fullmatch(pattern, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "stop"


def test_any_object_and_an_answer_that_is_cut(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "response_format": {"type": "json_object"}}
    found = client.chat.completions.create(**asked, seed=1, max_tokens=60).choices[0]
    assert found.message.content.startswith("{")
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict)
    cut = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, extra_body={"structured_outputs": LONG}
    )
    assert re.fullmatch(r"\[[0-9,]+", cut.choices[0].message.content)
    assert cut.choices[0].finish_reason == "length"
    ends = {"extra_body": {"ignore_eos": True, "structured_outputs": {"choice": ["yes", "no"]}}}
    chosen = client.chat.completions.create(model=MODEL, messages=MESSAGES, **ends)
    assert chosen.choices[0].finish_reason == "stop"  # nothing may follow, whatever is ignored
    assert chosen.choices[0].message.content in ("yes", "no")


def test_grpc(up: Cluster) -> None:
    outputs = inference_pb2.StructuredOutputs
    asked = {
        PHONE: outputs(regex=PHONE),
        "yes|no": outputs(choice=inference_pb2.Alternatives(texts=["yes", "no"])),
        "true|false": outputs(json='{"type": "boolean"}'),
    }
    with grpc.insecure_channel(up.grpc_address) as channel:
        inference = inference_pb2_grpc.InferenceStub(channel)
        for pattern, wanted in asked.items():
            sampling = inference_pb2.SamplingParams(structured_outputs=wanted, max_tokens=60)
            request = inference_pb2.GenerateRequest(text="def f(x):", sampling=sampling)
            assert re.fullmatch(
                pattern, "".join(part.text for part in inference.Generate(request, timeout=60))
            )
        sampling = inference_pb2.SamplingParams(structured_outputs=outputs(regex="("))
        with pytest.raises(grpc.RpcError) as refused:
            list(inference.Generate(inference_pb2.GenerateRequest(text="a", sampling=sampling), timeout=60))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ("baton-field", "structured_outputs.regex") in refused.value.trailing_metadata()


def test_a_schema_that_cannot_be_kept_to_is_refused_before_anything_is_placed(client: OpenAI) -> None:
    schema = {"type": "integer", "multipleOf": 99999989}
    formatted: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=formatted)
    assert refused.value.param == "response_format.json_schema.schema"


def test_neither_a_handoff_nor_neighbours_change_an_answer(up: Cluster, start_cluster: StartCluster) -> None:
    """Guided and unguided requests at once, over two kinds of workers, against each alone on a hybrid one."""
    plain = bodies("mixed", 4, 60)
    guided: list[Body] = [
        {**body, "max_tokens": 400, "structured_outputs": LONG, "ignore_eos": False}
        for body in bodies("guided", 4, 60)
    ]
    for body in guided:
        body.pop("stop", None)
    asked = [*plain, *guided]
    with start_cluster("--hybrid", "1") as alone:
        expected = [asyncio.run(streams(alone, [body]))[0] for body in asked]
    assert asyncio.run(streams(up, asked)) == expected
    for answer in (choice for one in expected[4:] for choice in one.choices.values()):
        assert len(json.loads(answer.text)) == 40
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("victim", "number"),
    [("decode-0", signal.SIGKILL), ("prefill-0", signal.SIGKILL), ("decode-1", signal.SIGTERM)],
    ids=["killed", "killed-prefill", "drained"],
)
def test_a_worker_that_goes_changes_no_token(up: Cluster, victim: str, number: signal.Signals) -> None:
    asked: list[Body] = [
        {"prompt": "x = ", "max_tokens": 400, "structured_outputs": LONG, **sampling}
        for sampling in (
            {"temperature": 0},
            {"seed": 5},
            {"seed": 6, "temperature": 1.5},
            {"seed": 7, "n": 2},
        )
    ]
    undisturbed = asyncio.run(streams(up, asked))

    async def kill() -> None:
        os.kill(up.pids()[victim], number)

    assert asyncio.run(streams(up, asked, kill)) == undisturbed
    for answer in (choice for one in undisturbed for choice in one.choices.values()):
        assert len(json.loads(answer.text)) == 40


def test_the_router_goes_on_without_the_process_that_checks(up: Cluster) -> None:
    with httpx.Client(base_url=up.base_url, timeout=60) as http:
        for number in range(2):
            body = {"prompt": "a", "structured_outputs": {"regex": f"[a-c]{{3}}{number}"}}
            assert re.fullmatch(
                r"[a-c]{3}\d", http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            )
            for pid in checkers(up):
                os.kill(pid, signal.SIGKILL)


def checkers(cluster: Cluster) -> list[int]:
    router = psutil.Process(cluster.pids()["router"])
    found = [child.pid for child in router.children() if "baton.grammar.checker" in child.cmdline()]
    assert len(found) == 1
    return found
