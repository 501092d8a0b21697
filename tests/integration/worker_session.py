"""Requests to one worker, as a router would send them: the test chooses what a placement would."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence

import grpc

from baton.rpc.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from tests.cluster import Cluster


class RequestFailed(Exception):
    """The worker ended the request with an error of this kind."""

    def __init__(self, error: worker_pb2.RequestError) -> None:
        super().__init__(error.message)
        self.kind = error.kind


def pull_from(cluster: Cluster, worker_id: str, blocks: int) -> worker_pb2.Pull:
    return worker_pb2.Pull(
        address=cluster.workers()[worker_id],
        incarnation=cluster.status(worker_id).incarnation,
        blocks=blocks,
    )


def generate(
    cluster: Cluster,
    worker_id: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    pull: worker_pb2.Pull | None = None,
    cache_salt: str = "",
    prefill_worker: str = "",
    timeout_s: float = 0.0,
) -> tuple[list[int], worker_pb2.PrefillReport]:
    """Greedy tokens and the prefill report of a prompt that runs on the worker.

    Raises:
        RequestFailed: the worker ended it with an error.
    """
    start = worker_pb2.Start(
        key=1,
        request_id="test",
        prompt_token_ids=prompt,
        sampling=worker_pb2.Sampling(
            max_tokens=max_tokens, temperature=0, top_p=1, repetition_penalty=1, ignore_eos=True
        ),
        cache_salt=cache_salt,
        pull=pull,
        timeout_s=timeout_s,
    )
    if prefill_worker:
        start.prefill_address = cluster.workers()[prefill_worker]
        start.prefill_incarnation = cluster.status(prefill_worker).incarnation
    requests: queue.SimpleQueue[worker_pb2.SessionRequest | None] = queue.SimpleQueue()
    requests.put(worker_pb2.SessionRequest(hello=worker_pb2.Hello(router_id="test")))
    requests.put(worker_pb2.SessionRequest(starts=[start]))
    tokens: list[int] = []
    report = worker_pb2.PrefillReport()
    with grpc.insecure_channel(cluster.workers()[worker_id]) as channel:
        session = worker_pb2_grpc.DecodeStub(channel).Session(iter(requests.get, None), timeout=60)
        for output in _outputs(session):
            if output.HasField("error"):
                raise RequestFailed(output.error)
            tokens += output.token_ids
            if output.HasField("prefill"):
                report = output.prefill
            if output.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
                break
        requests.put(None)
    return tokens, report


def _outputs(session: Iterator[worker_pb2.StepOutputs]) -> Iterator[worker_pb2.RequestOutput]:
    for step in session:
        yield from step.outputs
