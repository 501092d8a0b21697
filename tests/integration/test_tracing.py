"""One trace per request over every process, from the client's traceparent on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import grpc
import httpx
import pytest

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.otlp_collector import Collector, Span, running_collector

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
REMOTE = {"tokenize", "wait", "place", "stream", "queue", "prefill", "chunk", "handoff", "tail", "decode"}
PROMPT_TOKENS = 100


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture
def traced(start_cluster: StartCluster, collector: Collector) -> Iterator[Cluster]:
    """A cluster that prefills remotely and sends traces, at once."""
    flags = ("--policy", "round-robin", "--otlp-endpoint", collector.endpoint)
    with start_cluster(*flags, environ={"OTEL_BSP_SCHEDULE_DELAY": "100"}) as up:
        yield up


def ask(cluster: Cluster, **headers: str) -> httpx.Response:
    prompt = [random.SystemRandom().randrange(100, 4000) for _ in range(PROMPT_TOKENS)]
    body = {"model": "baton-small", "prompt": prompt, "max_tokens": 4, "ignore_eos": True}
    return httpx.post(f"{cluster.base_url}/v1/completions", json=body, headers=headers, timeout=60)


def one(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


def test_a_request_is_one_trace_over_router_and_both_workers(traced: Cluster, collector: Collector) -> None:
    answer = ask(traced, traceparent=f"00-{TRACE}-{PARENT}-01")
    spans = collector.wait_for({"request", *REMOTE}, PROMPT_TOKENS)
    assert {span.trace_id for span in spans} == {TRACE}
    root = one(spans, "request")
    assert root.parent_id == PARENT
    assert root.attributes["request_id"] == answer.headers["x-request-id"]
    parents = {span.name: span.parent_id for span in spans}
    for name in ("tokenize", "wait", "place", "stream", "queue", "prefill", "handoff", "decode"):
        assert parents[name] == root.span_id, name
    assert parents["chunk"] == one(spans, "prefill").span_id
    assert parents["tail"] == one(spans, "handoff").span_id
    processes = {span.name: span.process for span in spans}
    assert (processes["request"], processes["prefill"], processes["decode"]) == (
        "router",
        "prefill-0",
        "decode-0",
    )
    for span in spans:
        # Each process has read the wall clock once; who is scheduled late ends late.
        assert root.start_s - 1 <= span.start_s <= span.end_s <= root.end_s + 1, span
    prefill = one(spans, "prefill")
    chunks = [span for span in spans if span.name == "chunk"]
    assert all(prefill.start_s <= span.start_s <= span.end_s <= prefill.end_s for span in chunks)
    assert sum(span.attributes["tokens"] for span in chunks) == PROMPT_TOKENS  # type: ignore[misc]

    collector.spans.clear()
    ask(traced, traceparent=f"00-{TRACE}-{PARENT}-00")  # its client has decided not to trace it
    with grpc.insecure_channel(traced.grpc_address) as channel:
        request = inference_pb2.GenerateRequest(model="baton-small", text="def f(")
        request.sampling.max_tokens = 2
        metadata = (("traceparent", f"00-{TRACE[::-1]}-{PARENT}-01"),)
        list(inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=metadata, timeout=60))
    spans = collector.wait_for({"request", "decode"})
    assert {span.trace_id for span in spans} == {TRACE[::-1]}
