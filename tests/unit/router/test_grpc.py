"""baton.v1.Inference with a real client: the same answers as HTTP, errors as status codes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from tests.unit.router.conftest import ANSWER
from tests.unit.router.fakes import FakeWorker, RunningRouter

Request = inference_pb2.GenerateRequest
Sampling = inference_pb2.SamplingParams
Outputs = inference_pb2.StructuredOutputs


@pytest.fixture
async def channel(router: RunningRouter) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(router.grpc_address) as channel:
        yield channel


@pytest.fixture
def inference(channel: grpc.aio.Channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)


async def test_generate_streams_text_then_usage(
    inference: inference_pb2_grpc.InferenceStub, script: list[int]
) -> None:
    responses = [r async for r in inference.Generate(Request(text="Hi", request_id="mine"), timeout=60)]
    *pieces, last = responses
    assert "".join(piece.text for piece in pieces) == ANSWER
    assert [i for piece in pieces for i in piece.token_ids] == [*script, 1]
    assert pieces[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
    assert last.usage.completion_tokens == len(script) + 1
    assert last.usage.cached_tokens == 3
    assert {response.request_id for response in responses} == {"mine"}


async def test_every_option_is_understood(
    inference: inference_pb2_grpc.InferenceStub, worker: FakeWorker
) -> None:
    sampling = Sampling(
        max_tokens=30, temperature=0, stop=["brown"], n=2, seed=5, logprobs=2, prompt_logprobs=1,
        logit_bias={9: 1.5}, top_k=-1, min_tokens=1, include_stop_str_in_output=True,
    )  # fmt: skip
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="Hi")])
    responses = [r async for r in inference.Generate(Request(chat=chat, sampling=sampling), timeout=60)]
    for index in (0, 1):
        mine = [response for response in responses[:-1] if response.index == index]
        assert "".join(response.text for response in mine) == "The quick brown"
        assert mine[-1].stop_reason == "brown"
        assert all(len(response.logprobs) == len(response.token_ids) for response in mine)
        assert len(mine[0].prompt_logprobs) == len(worker.starts[0].prompt_token_ids) - 1
    assert sorted(start.sampling.seed for start in worker.starts) == [5, 6]
    assert worker.starts[0].sampling.temperature == 0
    assert dict(worker.starts[0].sampling.logit_bias) == {9: 1.5}


async def test_what_the_answer_must_be_travels_as_a_grammar(
    inference: inference_pb2_grpc.InferenceStub, worker: FakeWorker
) -> None:
    both = inference_pb2.Alternatives(texts=["yes", "no"])
    asked = (Outputs(regex="[ab]{3}"), Outputs(choice=both), Outputs(json_object=False), None)
    for outputs in asked:
        sampling = Sampling(max_tokens=1, structured_outputs=outputs)
        async for _ in inference.Generate(Request(text="a", sampling=sampling), timeout=60):
            pass
    regex, choice, *none = [start.sampling.grammar for start in worker.starts]
    assert "[ab]{3}" in regex
    assert "yes" in choice
    assert none == ["", ""]


async def test_models_and_tokens(inference: inference_pb2_grpc.InferenceStub, worker: FakeWorker) -> None:
    models = (await inference.ListModels(inference_pb2.ListModelsRequest(), timeout=60)).models
    assert [(model.id, model.max_model_len) for model in models] == [("baton-small", 16384)]
    tokens = await inference.Tokenize(inference_pb2.TokenizeRequest(text="def f"), timeout=60)
    async for _ in inference.Generate(Request(text="def f", sampling=Sampling(max_tokens=1)), timeout=60):
        pass
    assert tokens.token_ids == worker.starts[0].prompt_token_ids


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (Request(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (Request(text=""), grpc.StatusCode.INVALID_ARGUMENT, "text"),
        (Request(model="other", text="a"), grpc.StatusCode.NOT_FOUND, "model"),
        (Request(chat=inference_pb2.Chat()), grpc.StatusCode.INVALID_ARGUMENT, "chat"),
        (
            Request(chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="robot")])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "chat",
        ),
        (
            Request(token_ids=inference_pb2.TokenIds(ids=[5000])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "token_ids",
        ),
        (Request(text="a", cache_salt="x" * 2000), grpc.StatusCode.INVALID_ARGUMENT, "cache_salt"),
        *(
            (Request(text="a", sampling=sampling), grpc.StatusCode.INVALID_ARGUMENT, field)
            for field, sampling in {
                "temperature": Sampling(temperature=float("nan")),
                "top_p": Sampling(top_p=0),
                "min_p": Sampling(min_p=2),
                "presence_penalty": Sampling(presence_penalty=float("inf")),
                "repetition_penalty": Sampling(repetition_penalty=-1),
                "max_tokens": Sampling(max_tokens=0),
                "n": Sampling(n=1000),
                "logprobs": Sampling(logprobs=21),
                "top_k": Sampling(top_k=-5),
                "logit_bias": Sampling(logit_bias={5000: 1}),
                "stop": Sampling(stop=[""]),
                "stop_token_ids": Sampling(stop_token_ids=[5000]),
                "min_tokens": Sampling(min_tokens=99_999),
                "structured_outputs.json": Sampling(structured_outputs=Outputs(json='{"type": 5}')),
                "structured_outputs.choice": Sampling(
                    structured_outputs=Outputs(choice=inference_pb2.Alternatives())
                ),
            }.items()
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_errors_name_the_field(
    inference: inference_pb2_grpc.InferenceStub, request_: Request, code: grpc.StatusCode, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in inference.Generate(request_, timeout=60):
            pass
    assert error.value.code() == code
    assert field in error.value.details()
    assert dict(error.value.trailing_metadata())["baton-field"] == field


async def test_a_client_that_leaves_cancels_its_work(
    inference: inference_pb2_grpc.InferenceStub, worker: FakeWorker
) -> None:
    worker.hold_at = 2
    call = inference.Generate(Request(text="Hi", sampling=Sampling(n=2)))
    await call.read()
    call.cancel()
    await worker.wait_for("len(self.cancelled) == 2")


async def test_health_and_reflection_are_on(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(60):
        for service in ("", "baton.v1.Inference"):
            while True:
                reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    break
                await asyncio.sleep(0.02)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    wanted = reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.v1.Inference")
    async for reply in reflection.ServerReflectionInfo(iter([wanted])):
        files = [
            FileDescriptorProto.FromString(raw)
            for raw in reply.file_descriptor_response.file_descriptor_proto
        ]
        assert "Inference" in [service.name for file in files for service in file.service]
