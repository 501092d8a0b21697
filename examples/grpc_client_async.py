"""Asks a running cluster several things at once over gRPC: `python examples/grpc_client_async.py`."""

import asyncio
import os

import grpc

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc

ADDRESS = os.environ.get("GRPC_ADDRESS", "127.0.0.1:50051")
QUESTIONS = ("What does a list do?", "What is a module?", "How is a file read?")


async def ask(inference: inference_pb2_grpc.InferenceStub, model: str, question: str) -> str:
    request = inference_pb2.GenerateRequest(
        model=model,
        chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=question)]),
        sampling=inference_pb2.SamplingParams(max_tokens=24, seed=7),
    )
    return "".join([response.text async for response in inference.Generate(request, timeout=60)])


async def main() -> None:
    async with grpc.aio.insecure_channel(ADDRESS) as channel:
        inference = inference_pb2_grpc.InferenceStub(channel)
        models = await inference.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
        answers = await asyncio.gather(*(ask(inference, models.models[0].id, text) for text in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} -> {answer!r}")


if __name__ == "__main__":
    asyncio.run(main())
