"""Runs in the client pod: health and one stream of baton.v1.Inference. Argument: host of the Service."""

import json
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc

with grpc.insecure_channel(f"{sys.argv[1]}:50051") as channel:
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    inference = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.GenerateRequest(
        text="import os",
        sampling=inference_pb2.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True),
    )
    responses = list(inference.Generate(request, timeout=60))
print(
    json.dumps(
        {
            "serving": health.status == health_pb2.HealthCheckResponse.SERVING,
            "tokens": responses[-1].usage.completion_tokens,
            "text": "".join(response.text for response in responses),
        }
    )
)
