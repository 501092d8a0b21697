"""The OpenAI endpoints against a fake decode worker, with real clients over real sockets."""

from __future__ import annotations

import json

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.unit.router.fakes import FakeWorker, RunningRouter

NAME = "baton-small"


async def events(client: httpx.AsyncClient, path: str, body: dict) -> tuple[httpx.Headers, list[dict]]:
    """The decoded events of a streamed answer, which must end with [DONE]."""
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return response.headers, [json.loads(line[6:]) for line in lines[:-1]]


async def test_a_completion_is_the_workers_tokens_as_text(http: httpx.AsyncClient, answer: str) -> None:
    response = await http.post("/v1/completions", json={"model": NAME, "prompt": "Hi", "max_tokens": 400})
    body = response.json()
    assert response.status_code == 200, body
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == answer
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert response.headers["x-baton-prefill"] == "local"
    assert response.headers["x-baton-decode-worker"] == "decode-0"
    assert response.headers["x-baton-cached-tokens"] == "3"


async def test_a_streamed_completion_joins_to_the_same_text(
    http: httpx.AsyncClient, answer: str, script: list[int]
) -> None:
    headers, chunks = await events(
        http,
        "/v1/completions",
        {
            "prompt": "Hi",
            "max_tokens": 400,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        },
    )
    *pieces, usage = chunks
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == answer
    assert [i for piece in pieces for i in piece["choices"][0]["token_ids"]] == [*script, 1]
    assert pieces[0]["choices"][0]["prompt_token_ids"]
    assert all(piece["choices"][0]["prompt_token_ids"] is None for piece in pieces[1:])
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * len(script) + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(script) + 1
    assert headers["x-baton-prefill"] == "local"


async def test_a_chat_streams_its_role_first(http: httpx.AsyncClient, answer: str) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]}
    ]
    _, chunks = await events(http, "/v1/chat/completions", {"messages": messages, "return_token_ids": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["prompt_token_ids"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == answer
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert chunks[0]["object"] == "chat.completion.chunk"


async def test_usage_comes_with_every_chunk_when_asked(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, chunks = await events(
        http, "/v1/completions", {"prompt": "Hi", "max_tokens": 3, "stream_options": options}
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


async def test_n_choices_of_several_prompts_are_numbered_prompt_by_prompt(
    http: httpx.AsyncClient, worker: FakeWorker
) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "seed": 7}
    whole = (await http.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["completion_tokens"] == 8
    prompts = [list(start.prompt_token_ids) for start in worker.starts]
    assert whole["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[-1])
    assert sorted(start.sampling.seed for start in worker.starts) == [7, 7, 8, 8]
    _, chunks = await events(http, "/v1/completions", body)
    finished = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(choice["index"] for choice in finished) == [0, 1, 2, 3]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
async def test_token_ids_reach_the_worker_as_they_are(
    http: httpx.AsyncClient, worker: FakeWorker, prompt: list
) -> None:
    response = await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
    assert response.status_code == 200
    assert list(worker.starts[0].prompt_token_ids) == [5, 6, 7]


async def test_every_sampling_field_reaches_the_worker(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    body = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "repetition_penalty": 1.5, "logit_bias": {"9": -100},
        "stop_token_ids": [11], "seed": -1, "ignore_eos": True, "min_tokens": 2, "max_tokens": 3,
    }  # fmt: skip
    assert (await http.post("/v1/completions", json={"prompt": "Hi", **body})).status_code == 200
    sampling = worker.starts[0].sampling
    assert sampling.seed == 2**64 - 1
    assert dict(sampling.logit_bias) == {9: -100.0}
    assert list(sampling.stop_token_ids) == [11]
    for name in body.keys() - {"seed", "logit_bias", "stop_token_ids"}:
        assert getattr(sampling, name) == body[name], name


async def test_defaults_are_openais(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    await http.post("/v1/completions", json={"prompt": [5], "top_k": -1})
    await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    completion, chat = (start.sampling for start in worker.starts)
    assert (completion.max_tokens, completion.temperature, completion.top_k) == (16, 1.0, 0)
    assert chat.max_tokens == 16384 - len(worker.starts[1].prompt_token_ids)
    assert completion.seed != chat.seed
    assert not completion.HasField("logprobs")


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_answer_and_the_work(
    http: httpx.AsyncClient, worker: FakeWorker, include: bool
) -> None:
    worker.hold_at = 30
    body = {"prompt": "Hi", "max_tokens": 400, "stop": [" ju", "zzz"], "include_stop_str_in_output": include}
    choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"] == "The quick brown fox" + (" ju" if include else "")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " ju")
    await worker.wait_for("self.cancelled == {self.starts[0].key}")


async def test_a_stop_token_is_named(http: httpx.AsyncClient, script: list[int]) -> None:
    body = {"prompt": "Hi", "max_tokens": 400, "stop_token_ids": [script[3]]}
    choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", script[3])


async def test_completion_logprobs_have_one_entry_per_token(http: httpx.AsyncClient) -> None:
    body = {"prompt": "Hi", "max_tokens": 3, "logprobs": 2}
    whole = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    shape = whole["logprobs"]
    assert "".join(shape["tokens"]) == whole["text"]
    assert shape["token_logprobs"] == [-0.5] * 3
    assert [len(top) for top in shape["top_logprobs"]] == [2, 2, 2]
    offsets = [sum(map(len, shape["tokens"][:at])) for at in range(3)]
    assert shape["text_offset"] == offsets
    _, chunks = await events(http, "/v1/completions", body)
    assert [chunk["choices"][0]["logprobs"]["text_offset"][0] for chunk in chunks] == offsets


async def test_echo_shows_the_prompt_with_its_logprobs(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    body = {"prompt": "Hi there", "max_tokens": 2, "logprobs": 1, "echo": True}
    whole = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert whole["text"].startswith("Hi there")
    tokens = len(worker.starts[0].prompt_token_ids)
    assert whole["logprobs"]["token_logprobs"] == [None] + [-0.5] * (tokens - 1 + 2)
    assert "".join(whole["logprobs"]["tokens"]).endswith(whole["text"])
    _, chunks = await events(http, "/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    only = (await http.post("/v1/completions", json={**body, "max_tokens": 0})).json()
    assert only["choices"][0]["text"] == "Hi there"
    assert len(only["choices"][0]["logprobs"]["tokens"]) == tokens
    assert (only["choices"][0]["finish_reason"], only["usage"]["completion_tokens"]) == ("length", 0)


async def test_chat_logprobs_and_prompt_logprobs(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 40,
        "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1,
    }  # fmt: skip
    whole = (await http.post("/v1/chat/completions", json=body)).json()
    entries = whole["choices"][0]["logprobs"]["content"]
    assert len(entries) == whole["usage"]["completion_tokens"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)
    raw = bytes(byte for entry in entries for byte in entry["bytes"])
    assert raw.decode("utf-8", "ignore").startswith(whole["choices"][0]["message"]["content"][:-1])
    assert whole["prompt_logprobs"][0] is None
    assert len(whole["prompt_logprobs"]) == len(worker.starts[0].prompt_token_ids)
    named = await http.post("/v1/chat/completions", json={**body, "return_tokens_as_token_ids": True})
    assert named.json()["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")


async def test_a_completion_may_name_its_budget_as_chats_do(http: httpx.AsyncClient) -> None:
    body = {"prompt": "Hi there", "max_completion_tokens": 3, "ignore_eos": True}
    counts = [
        (await http.post("/v1/completions", json=asked)).json()["usage"]["completion_tokens"]
        for asked in (body, {**body, "max_tokens": 2})
    ]
    assert counts == [3, 2]


async def test_harmless_and_empty_fields_are_accepted(http: httpx.AsyncClient) -> None:
    body = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hi", "name": "ann"},
            {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "Go"},
        ],
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True,
        "modalities": ["text"], "max_tokens": 2, "stop": None, "temperature": None, "logit_bias": None,
    }  # fmt: skip
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    completion = {"prompt": "a", "n": 2, "best_of": 2, "suffix": None, "user": "u"}
    assert (await http.post("/v1/completions", json=completion)).status_code == 200


async def test_request_ids_go_in_and_out(http: httpx.AsyncClient, worker: FakeWorker) -> None:
    response = await http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    assert worker.starts[0].request_id == "mine-1"
    assert len((await http.get("/health")).headers["x-request-id"]) == 32


async def test_the_small_endpoints(http: httpx.AsyncClient) -> None:
    models = (await http.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == [NAME]
    assert (await http.get(f"/v1/models/{NAME}")).json()["max_model_len"] == 16384
    for path in ("/health", "/live", "/ready", "/version"):
        assert (await http.get(path)).status_code == 200, path
    tokens = (await http.post("/tokenize", json={"prompt": "def f", "return_token_strs": True})).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    text = (await http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()["prompt"]
    assert text.endswith("def f")
    chat = (await http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]})).json()
    assert chat["tokens"][0] == 0


async def test_metrics_count_what_happened(http: httpx.AsyncClient, router: RunningRouter) -> None:
    await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 5})
    await http.post("/v1/completions", json={"prompt": 5})
    page = (await http.get(f"{router.own_url}/metrics")).text
    for line in (
        f'vllm:time_to_first_token_seconds_count{{model_name="{NAME}"}} 1.0',
        f'vllm:inter_token_latency_seconds_count{{model_name="{NAME}"}} 4.0',
        f'vllm:e2e_request_latency_seconds_count{{model_name="{NAME}"}} 1.0',
        f'vllm:request_success_total{{finished_reason="length",model_name="{NAME}"}} 1.0',
        f'vllm:generation_tokens_total{{model_name="{NAME}"}} 5.0',
        f'vllm:num_requests_running{{model_name="{NAME}"}} 0.0',
        'baton_router_placements_total{kind="local",policy="round-robin"} 1.0',
        'baton_router_rejected_total{reason="invalid_request_error"} 1.0',
    ):
        assert line in page


async def test_the_openai_client_works_unchanged(router: RunningRouter, answer: str) -> None:
    async with AsyncOpenAI(base_url=f"{router.base_url}/v1", api_key="unused") as client:
        assert [model.id async for model in client.models.list()] == [NAME]
        completion = await client.completions.create(model=NAME, prompt="Hi", max_tokens=400, logprobs=1)
        assert completion.choices[0].text == answer
        messages = [{"role": "user", "content": "Hi"}]
        chat = await client.chat.completions.create(
            model=NAME, messages=messages, n=2, seed=3, logprobs=True, top_logprobs=2, stop=["lazy"]
        )
        assert [choice.index for choice in chat.choices] == [0, 1]
        assert chat.choices[1].message.content == answer.partition("lazy")[0]
        follow_up = [*messages, chat.choices[0].message, {"role": "user", "content": "More"}]
        stream = await client.chat.completions.create(
            model=NAME, messages=follow_up, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
        assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens_details is not None
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
        with pytest.raises(BadRequestError) as bad:
            await client.completions.create(model=NAME, prompt="Hi", temperature=9)
        assert bad.value.param == "temperature"
        with pytest.raises(NotFoundError) as missing:
            await client.completions.create(model="other", prompt="Hi")
        assert missing.value.code == "model_not_found"
