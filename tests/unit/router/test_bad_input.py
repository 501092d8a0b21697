"""Every malformed request gets a 4xx that names the field, and the next request is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.unit.router.fakes import FakeWorker, RunningRouter, running_router, running_worker

pytestmark = pytest.mark.asyncio(loop_scope="module")

C, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
VOCABULARY, CONTEXT = 4096, 16384


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(script: list[int]) -> AsyncIterator[RunningRouter]:
    async with running_worker(FakeWorker("decode-0", script)) as worker, running_router(worker) as up:
        yield up


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(served: RunningRouter) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.base_url, timeout=60) as client:
        yield client


def completion(**fields: object) -> bytes:
    return json.dumps({"prompt": "Hi", "max_tokens": 2, **fields}).encode()


def chat(**fields: object) -> bytes:
    return json.dumps({"messages": [USER], "max_tokens": 2, **fields}).encode()


def tool(name: str, **fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **fields}}


def chosen(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


DEEP = json.loads('{"not":' * 800 + "1" + "}" * 800)
CALLED = {"id": "call_1", "type": "function", "function": {"name": "a", "arguments": "{}"}}

# path, body, field, status
BAD: list[tuple[str, bytes, str, int]] = [
    # not JSON, or not an object
    (C, b"", "body", 400),
    (C, b"{", "body", 400),
    (C, b"[]", "body", 400),
    (C, b"null", "body", 400),
    (C, b'"text"', "body", 400),
    (C, b'{"prompt":"Hi"} and more', "body", 400),
    (C, b"\xff\xfe", "body", 400),
    (C, b'{"prompt":"\xff\xfe"}', "prompt", 400),
    (C, b'{"prompt":"\xed\xa0\x80"}', "prompt", 400),
    (C, b'{"prompt":"\\ud800"}', "prompt", 400),
    (C, b'{"prompt":"Hi","temperature":NaN}', "temperature", 400),
    (C, b'{"prompt":"Hi","top_p":Infinity}', "top_p", 400),
    (C, b'{"prompt":"Hi","min_p":-Infinity}', "min_p", 400),
    (C, b'{"prompt":"Hi","temperature":1e999}', "temperature", 400),
    (C, b'{"prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "prompt[0][0]", 400),
    (C, b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "x", 400),
    (C, b'{"metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b',"prompt":"Hi"}', "metadata", 400),
    (CHAT, b'{"messages":' + b'[{"content":' * 100_000, "messages[0].content[0].content", 400),
    # fields
    (C, b"{}", "prompt", 400),
    (C, completion(prompt=None), "prompt", 400),
    (C, completion(prompt=""), "prompt", 400),
    (C, completion(prompt=[]), "prompt", 400),
    (C, completion(prompt=[[]]), "prompt", 400),
    (C, completion(prompt=["a", ""]), "prompt", 400),
    (C, completion(prompt={"text": "Hi"}), "prompt", 400),
    (C, completion(prompt=5), "prompt", 400),
    (C, completion(prompt=[1, "a"]), "prompt", 400),
    (C, completion(prompt=[1, [2]]), "prompt", 400),
    (C, completion(prompt=[1.5]), "prompt[0]", 400),
    (C, completion(prompt=[-1]), "prompt[0]", 400),
    (C, completion(prompt=[None]), "prompt[0]", 400),
    (C, completion(prompt=[[1, True]]), "prompt[0][1]", 400),
    (C, completion(prompt=[VOCABULARY]), "prompt", 400),
    (C, completion(prompt=[2**40]), "prompt", 400),
    (C, completion(prompt=[[1], [VOCABULARY]]), "prompt", 400),
    (C, completion(prompt=["a"] * 1025), "prompt", 400),
    (C, completion(prompt=[5] * CONTEXT), "prompt", 400),
    (C, completion(prompt="word " * 60_000), "prompt", 400),
    (C, completion(prompt="a" * 4_000_000), "prompt", 400),
    (C, completion(model="gpt-4"), "model", 404),
    (C, completion(model=7), "model", 400),
    (C, completion(max_tokens=-1), "max_tokens", 400),
    (C, completion(max_tokens=0), "max_tokens", 400),
    (C, completion(max_tokens=1.5), "max_tokens", 400),
    (C, completion(max_tokens="10"), "max_tokens", 400),
    (C, completion(max_tokens=CONTEXT), "max_tokens", 400),
    (C, completion(max_tokens=10**30), "max_tokens", 400),
    (C, completion(temperature=-0.1), "temperature", 400),
    (C, completion(temperature=2.1), "temperature", 400),
    (C, completion(temperature="hot"), "temperature", 400),
    (C, completion(temperature=[1]), "temperature", 400),
    (C, completion(temperature=True), "temperature", 400),
    (C, completion(top_p=0), "top_p", 400),
    (C, completion(top_p=1.01), "top_p", 400),
    (C, completion(top_k=-2), "top_k", 400),
    (C, completion(top_k=1.5), "top_k", 400),
    (C, completion(min_p=1.5), "min_p", 400),
    (C, completion(presence_penalty=2.5), "presence_penalty", 400),
    (C, completion(frequency_penalty=-3), "frequency_penalty", 400),
    (C, completion(repetition_penalty=0), "repetition_penalty", 400),
    (C, completion(logit_bias={"5": 101}), "logit_bias", 400),
    (C, completion(logit_bias={"x": 1}), "logit_bias", 400),
    (C, completion(logit_bias={"-1": 1}), "logit_bias", 400),
    (C, completion(logit_bias={str(VOCABULARY): 1}), "logit_bias", 400),
    (C, completion(logit_bias={"٣": 1}), "logit_bias", 400),
    (C, completion(logit_bias=[5]), "logit_bias", 400),
    (C, completion(n=0), "n", 400),
    (C, completion(n=129), "n", 400),
    (C, completion(n="2"), "n", 400),
    (C, completion(prompt=["a"] * 16, n=128), "n", 400),
    (C, completion(best_of=3), "best_of", 400),
    (C, completion(suffix="end"), "suffix", 400),
    (C, completion(logprobs=21), "logprobs", 400),
    (C, completion(logprobs=-1), "logprobs", 400),
    (C, completion(logprobs=True), "logprobs", 400),
    (C, completion(prompt_logprobs=-1), "prompt_logprobs", 400),
    (C, completion(prompt_logprobs=1, stream=True), "prompt_logprobs", 400),
    (C, completion(stop=""), "stop", 400),
    (C, completion(stop=["a", ""]), "stop", 400),
    (C, completion(stop=["a"] * 17), "stop", 400),
    (C, completion(stop="a" * 2000), "stop", 400),
    (C, completion(stop=5), "stop", 400),
    (C, completion(stop_token_ids=[VOCABULARY]), "stop_token_ids", 400),
    (C, completion(stop_token_ids=["a"]), "stop_token_ids[0]", 400),
    (C, completion(min_tokens=3), "min_tokens", 400),
    (C, completion(min_tokens=-1), "min_tokens", 400),
    (C, completion(seed=2**64), "seed", 400),
    (C, completion(seed=1.5), "seed", 400),
    (C, completion(stream="yes"), "stream", 400),
    (C, completion(stream_options={"include_usage": True}), "stream_options", 400),
    (C, completion(stream=True, stream_options={"usage": True}), "stream_options.usage", 400),
    (C, completion(echo=1), "echo", 400),
    (C, completion(cache_salt=""), "cache_salt", 400),
    (C, completion(temprature=1), "temprature", 400),
    (C, completion(user="u", guided_json=5), "guided_json", 400),
    (C, completion(guided_regex="("), "guided_regex", 400),
    (C, completion(guided_choice=[]), "guided_choice", 400),
    (C, completion(guided_choice=["a"], guided_regex="a"), "guided_choice", 400),
    (C, completion(structured_outputs={"regexp": "a"}), "structured_outputs.regexp", 400),
    (C, completion(structured_outputs={"json": "{"}), "structured_outputs.json", 400),
    (C, completion(structured_outputs={"json": {"not": {}}}), "structured_outputs.json", 400),
    (C, completion(structured_outputs={"regex": "a" * 70_000}), "structured_outputs.regex", 400),
    (C, completion(structured_outputs={"grammar": "start: b"}), "structured_outputs.grammar", 400),
    (C, completion(messages=[USER]), "messages", 400),
    (C, completion(response_format={"type": "yaml"}), "response_format.type", 400),
    # chats
    (CHAT, b"{}", "messages", 400),
    (CHAT, chat(messages=[]), "messages", 400),
    (CHAT, chat(messages="Hi"), "messages", 400),
    (CHAT, chat(messages=["Hi"]), "messages[0]", 400),
    (CHAT, chat(messages=[{"role": "user"}]), "messages[0].content", 400),
    (CHAT, chat(messages=[{"content": "Hi"}]), "messages[0].role", 400),
    (CHAT, chat(messages=[USER, {"role": "robot", "content": "a"}]), "messages[1].role", 400),
    (CHAT, chat(messages=[{"role": "tool", "content": "a"}]), "messages[0].tool_call_id", 400),
    (CHAT, chat(messages=[{**USER, "tool_call_id": "a"}]), "messages[0].tool_call_id", 400),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", 400),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages[0].content[0].type",
        400,
    ),
    (CHAT, chat(messages=[{**USER, "tool_calls": [{}]}]), "messages[0].tool_calls[0].id", 400),
    (CHAT, chat(messages=[{**USER, "tool_calls": [CALLED]}]), "messages[0].tool_calls", 400),
    (CHAT, chat(messages=[{**USER, "colour": 1}]), "messages[0].colour", 400),
    (CHAT, chat(messages=[{"role": "user", "content": "word " * 60_000}]), "messages", 400),
    (CHAT, chat(top_logprobs=3), "top_logprobs", 400),
    (CHAT, chat(logprobs=5), "logprobs", 400),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", 400),
    (CHAT, chat(max_completion_tokens=0), "max_completion_tokens", 400),
    (CHAT, chat(max_completion_tokens=CONTEXT), "max_completion_tokens", 400),
    (CHAT, chat(tools=[{"type": "function"}]), "tools[0].function", 400),
    (CHAT, chat(tools=[tool("a"), tool("a b")]), "tools[1].function.name", 400),
    (CHAT, chat(tools=[tool("a\n")]), "tools[0].function.name", 400),
    (CHAT, chat(tools=[tool("a" * 65)]), "tools[0].function.name", 400),
    (CHAT, chat(tools=[tool("a"), tool("a")]), "tools[1].function.name", 400),
    (CHAT, chat(tools=[tool(f"f{at}") for at in range(129)]), "tools", 400),
    (CHAT, chat(tools=[{"type": "web_search", "function": {"name": "a"}}]), "tools[0].type", 400),
    (CHAT, chat(tools=[tool("a", kind="function")]), "tools[0].function.kind", 400),
    (CHAT, chat(tools=[tool("a", parameters=[])]), "tools[0].function.parameters", 400),
    (CHAT, chat(tools=[tool("a", parameters={"type": "string"})]), "tools[0].function.parameters", 400),
    (CHAT, chat(tools=[tool("a", parameters={"x": "a" * 70_000})]), "tools[0].function.parameters", 400),
    (CHAT, chat(tools=[tool("a", strict="yes")]), "tools[0].function.strict", 400),
    (CHAT, chat(tools=[tool("a")]), "tools", 400),  # the model's template knows none
    (CHAT, chat(tools=[tool("a")], tool_choice="any"), "tool_choice", 400),
    (CHAT, chat(tools=[tool("a")], tool_choice={"type": "tool"}), "tool_choice.type", 400),
    (CHAT, chat(tools=[tool("a")], tool_choice=chosen("b")), "tool_choice.function.name", 400),
    (CHAT, chat(tool_choice="required"), "tool_choice", 400),
    (CHAT, chat(tool_choice=chosen("a")), "tool_choice", 400),
    (CHAT, chat(tool_choice=None, functions=[{"name": "a"}]), "functions", 400),
    (CHAT, chat(function_call="auto"), "function_call", 400),
    (CHAT, chat(parallel_tool_calls="no"), "parallel_tool_calls", 400),
    (
        CHAT,
        chat(tools=[tool("a")], tool_choice="required", response_format={"type": "json_object"}),
        "response_format",
        400,
    ),
    (
        CHAT,
        chat(tools=[tool("a")], tool_choice=chosen("a"), structured_outputs={"regex": "a"}),
        "structured_outputs.regex",
        400,
    ),
    (
        CHAT,
        chat(tools=[tool("a"), tool("b", parameters={"not": {}})], tool_choice="required"),
        "tools[1].function.parameters",
        400,
    ),
    (
        CHAT,
        chat(tools=[tool("a", parameters=DEEP)], tool_choice="required"),
        "tools[0].function.parameters",
        400,
    ),
    (C, completion(tools=[tool("a")]), "tools", 400),
    (C, completion(tool_choice="required"), "tool_choice", 400),
    (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema", 400),
    (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "x"}}}),
        "response_format.json_schema.schema",
        400,
    ),
    (
        CHAT,
        chat(response_format={"type": "json_object"}, structured_outputs={"json_object": True}),
        "response_format",
        400,
    ),
    (CHAT, chat(modalities=["text", "audio"]), "modalities", 400),
    (CHAT, chat(audio={"voice": "a"}), "audio", 400),
    (CHAT, chat(reasoning_effort="high"), "reasoning_effort", 400),
    (CHAT, chat(best_of=True), "best_of", 400),
    (CHAT, chat(prompt="Hi"), "prompt", 400),
    ("/tokenize", b"{}", "prompt", 400),
    ("/tokenize", b'{"prompt":"a","messages":[]}', "messages", 400),
    ("/detokenize", b'{"tokens":[4096]}', "tokens", 400),
    ("/detokenize", b'{"tokens":[-1]}', "tokens[0]", 400),
]


def check_error(response: httpx.Response, field: str | None, status: int) -> None:
    """The response is OpenAI's error object, and names `field` in its message too."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field, error
    if field is not None:
        assert field in error["message"]


async def check_next_request(http: httpx.AsyncClient) -> None:
    good = await http.post(C, content=completion(), headers={"content-type": "application/json"})
    assert good.status_code == 200, good.text


def short(value: object) -> str:
    return value.decode("ascii", "backslashreplace")[:60] if isinstance(value, bytes) else str(value)


@pytest.mark.parametrize(("path", "body", "field", "status"), BAD, ids=short)
async def test_the_field_is_named(
    http: httpx.AsyncClient, path: str, body: bytes, field: str, status: int
) -> None:
    response = await http.post(path, content=body, headers={"content-type": "application/json"})
    check_error(response, field, status)
    await check_next_request(http)


@pytest.mark.parametrize("field", ["prompt", "max_tokens"])
async def test_too_long_is_told_apart(http: httpx.AsyncClient, field: str) -> None:
    long = {"prompt": [5] * CONTEXT} if field == "prompt" else {"max_tokens": CONTEXT}
    response = await http.post(C, json={"prompt": "Hi", **long})
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_a_default_budget_shrinks_to_what_fits(http: httpx.AsyncClient) -> None:
    response = await http.post(C, json={"prompt": [5] * (CONTEXT - 3)})
    assert response.json()["usage"]["completion_tokens"] == 3


async def test_unknown_paths_and_methods(http: httpx.AsyncClient) -> None:
    check_error(await http.get("/v1/embeddings"), None, 404)
    check_error(await http.get("/v1/models/other"), "model", 404)
    response = await http.get(C)
    check_error(response, None, 405)
    assert response.headers["allow"] == "POST"
    check_error(await http.delete("/v1/models"), None, 405)


async def test_other_media_types_are_refused(http: httpx.AsyncClient) -> None:
    form = await http.post(C, content=completion(), headers={"content-type": "text/plain"})
    check_error(form, "content-type", 415)
    packed = await http.post(
        C, content=completion(), headers={"content-type": "application/json", "content-encoding": "gzip"}
    )
    check_error(packed, "content-encoding", 415)
    utf8 = {"content-type": "application/json; charset=utf-8"}
    assert (await http.post(C, content=completion(), headers=utf8)).status_code == 200


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(http: httpx.AsyncClient) -> None:
    check_error(await http.post(C, json={"prompt": "a" * 50_000_000}), "body", 413)
    await check_next_request(http)


async def test_a_body_of_unknown_length_is_read_no_further_than_allowed(http: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield b"a" * 1_000_000

    response = await http.post(C, content=endless(), headers={"content-type": "application/json"})
    check_error(response, "body", 413)
    await check_next_request(http)


async def raw(served: RunningRouter, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.router.http_port)
    try:
        writer.write(request)
        async with asyncio.timeout(60):
            return await reader.read(65536)
    finally:
        writer.close()


async def test_what_is_not_http_is_told_so(served: RunningRouter) -> None:
    answer = await raw(served, b"hello there\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


async def test_a_length_that_is_a_lie_is_refused_at_once(served: RunningRouter) -> None:
    head = (
        f"POST {C} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 50000000\r\n\r\n"
    )
    assert (await raw(served, head.encode())).startswith(b"HTTP/1.1 413 ")


async def test_a_body_that_never_ends_is_given_up(
    served: RunningRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.http._BODY_TIMEOUT_S", 0.1)
    head = f"POST {C} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n"
    assert (await raw(served, head.encode() + b'{"prompt"')).startswith(b"HTTP/1.1 408 ")
