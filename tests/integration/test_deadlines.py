"""Every worker on the way knows how long a client waits, gives up what is late, and the client is told."""

from __future__ import annotations

import random
import time

import grpc
import httpx
import pytest

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from tests.cluster import Cluster
from tests.integration.worker_session import RequestFailed, generate

LONG = {"prompt": [5] * 20, "max_tokens": 12_000, "ignore_eos": True}


def test_a_late_answer_is_a_504(cluster: Cluster) -> None:
    response = httpx.post(
        f"{cluster.base_url}/v1/completions", json=LONG, headers={"x-request-timeout": "0.5"}, timeout=30
    )
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    wait_until_idle(cluster)


def test_a_grpc_deadline_is_kept(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=LONG["prompt"]),
            sampling=inference_pb2.SamplingParams(max_tokens=12_000, ignore_eos=True),
        )
        with pytest.raises(grpc.RpcError) as failure:
            list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=0.5))
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until_idle(cluster)


@pytest.mark.parametrize("prefill_worker", ["", "prefill-0"], ids=["local", "remote"])
def test_a_worker_gives_up_by_itself_what_is_late(cluster: Cluster, prefill_worker: str) -> None:
    draw = random.SystemRandom()
    prompt = [draw.randrange(100, 4000) for _ in range(50)]
    with pytest.raises(RequestFailed) as failure:
        generate(cluster, "decode-0", prompt, max_tokens=12_000, prefill_worker=prefill_worker, timeout_s=0.5)
    assert failure.value.kind == worker_pb2.RequestError.EXPIRED
    wait_until_idle(cluster)


def wait_until_idle(cluster: Cluster) -> None:
    deadline = time.monotonic() + 10
    while any(cluster.status(worker_id).pinned_blocks for worker_id in ("prefill-0", "decode-0")):
        assert time.monotonic() < deadline, "blocks are still pinned"
        time.sleep(0.05)
