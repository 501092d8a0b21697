"""Programs written for other servers run unchanged: the official OpenAI client, and gRPC by reflection."""

from __future__ import annotations

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI

from tests.cluster import Cluster
from tests.unit.router.test_bad_input import BAD, C, check_error, completion

MODEL = "baton-small"
PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> OpenAI:
    return OpenAI(base_url=f"{cluster.base_url}/v1", api_key="unused", max_retries=0)


def test_models(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completions_whole_and_streamed(client: OpenAI) -> None:
    request = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**request)
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    stream = client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.prompt_tokens_details.cached_tokens >= 0


def test_several_prompts_echo_and_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[PROMPT, "import os"], max_tokens=4, temperature=0, echo=True, logprobs=2, n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith(PROMPT) for choice in answer.choices[:2])
    assert all(choice.text.startswith("import os") for choice in answer.choices[2:])
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens) == "<|bos|>" + answer.choices[0].text
    assert all(len(top) in (2, 3) for top in logprobs.top_logprobs[1:])
    assert answer.choices[0].text == answer.choices[1].text  # greedy


def test_chat_whole_and_streamed(client: OpenAI) -> None:
    request = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is a list?"},
        ],
        "max_completion_tokens": 16,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**request)
    assert whole.choices[0].message.role == "assistant"
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens
    assert all(len(position.top_logprobs) == 3 for position in content)
    pieces = [event.choices[0] for event in client.chat.completions.create(**request, stream=True)]
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason


def test_seed_repeats_and_n_differs(client: OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=20, temperature=1.2, seed=seed, n=2
        )
        return [choice.text for choice in answer.choices]

    first = sample(1)
    assert sample(1) == first
    assert first[0] != first[1]
    assert sample(2) != first


def test_stop_ends_before_the_stop_string(client: OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0).choices[0].text
    stop = free[10:13]
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "zzz"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.usage.completion_tokens < 40


def test_errors_are_the_clients_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 200_000}])
    assert caught.value.code == "context_length_exceeded"
    assert not issubclass(BadRequestError, AuthenticationError)


def test_malformed_requests_name_the_field_and_disturb_nothing(cluster: Cluster) -> None:
    """The table is that of the router's own tests; here every worker is real."""
    headers = {"content-type": "application/json"}
    assert len(BAD) >= 60
    with httpx.Client(base_url=cluster.base_url, timeout=60) as http:
        for path, body, field, status in BAD:
            check_error(http.post(path, content=body, headers=headers), field, status)
            assert http.post(C, content=completion(), headers=headers).status_code == 200


def test_grpc_by_reflection_alone(cluster: Cluster) -> None:
    """A client that has no stubs: it asks the server for the protos, as grpcurl does."""
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "baton.v1.Inference" in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("baton.v1.Inference").methods_by_name["Generate"]
        request = json_format.ParseDict(
            {"model": MODEL, "text": PROMPT, "sampling": {"maxTokens": 8, "temperature": 0}},
            GetMessageClass(method.input_type)(),
        )
        call = channel.unary_stream(
            "/baton.v1.Inference/Generate",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        responses = [json_format.MessageToDict(response) for response in call(request, timeout=60)]
    assert sum(len(response.get("tokenIds", [])) for response in responses) == 8
    assert responses[-1]["usage"]["completionTokens"] == 8
