"""Asks a running cluster over gRPC: `python examples/grpc_client.py`."""

import os

import grpc

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc

address = os.environ.get("GRPC_ADDRESS", "127.0.0.1:50051")

with grpc.insecure_channel(address) as channel:
    inference = inference_pb2_grpc.InferenceStub(channel)
    model = inference.ListModels(inference_pb2.ListModelsRequest(), timeout=10).models[0]
    print(f"{model.id}, up to {model.max_model_len} tokens")

    request = inference_pb2.GenerateRequest(
        model=model.id,
        text="def read_lines(path):",
        sampling=inference_pb2.SamplingParams(max_tokens=24, temperature=0),
    )
    for response in inference.Generate(request, timeout=60):
        print(response.text, end="", flush=True)
        if response.HasField("usage"):
            print(f"\nusage: {response.usage.prompt_tokens} + {response.usage.completion_tokens} tokens")
