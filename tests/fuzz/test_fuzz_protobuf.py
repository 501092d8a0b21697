"""Whatever bytes another process sends, they become a value or a refusal; a service never trips over them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from hypothesis import strategies as st

from baton.errors import BatonError
from baton.kv.index import PrefixIndex
from baton.routing import ClusterView, Request, Unplaceable, create_policy
from baton.rpc.kvstore_messages import check_worker, decode_chains, decode_events, worker_view
from baton.rpc.v1 import inference_pb2, kvstore_pb2, worker_pb2
from baton.transfer.wire import description_from_proto
from baton.worker.convert import context_from, sampling_from
from services.kvstore.memory import MemoryBackend
from services.kvstore.state import ClusterState
from services.router.grpc_front import _sampling_fields
from tests.fuzz.explore import explore
from tests.fuzz.mutations import mutated

Kind = TypeVar("Kind", bound=Message)
"""Any message."""

Event = kvstore_pb2.IndexEvent
ID = bytes(range(16))
SAMPLING = worker_pb2.Sampling(
    max_tokens=5, temperature=0.5, top_p=0.5, top_k=3, seed=7, logit_bias={5: 1.0}, stop_token_ids=[3],
    grammar="{}",
)  # fmt: skip
START = worker_pb2.Start(key=1, request_id="r", prompt_token_ids=[1, 2, 3], sampling=SAMPLING)
POINTS = [kvstore_pb2.CurvePoint(size=size, seconds=size / 1000) for size in (1, 16, 256)]
WORKER = kvstore_pb2.Worker(
    worker_id="a", incarnation="one", address="127.0.0.1:1", role=worker_pb2.ROLE_HYBRID, total_blocks=100,
    max_model_len=1000, prefill_curve=POINTS, decode_curve=POINTS, host_bytes_per_s=1e9,
)  # fmt: skip
BEAT = kvstore_pb2.Beat(worker=WORKER, load=worker_pb2.WorkerLoad(total_blocks=100, free_blocks=5, running=2))
EVENTS = kvstore_pb2.IndexEvents(
    worker_id="a", incarnation="one", sequence=1, snapshot=True,
    events=[
        Event(kind=Event.STORED, tier=kvstore_pb2.TIER_DEVICE, block_ids=ID * 2),
        Event(kind=Event.REMOVED, tier=kvstore_pb2.TIER_HOST, block_ids=ID),
        Event(kind=Event.CLEARED),
    ],
)  # fmt: skip
DESCRIPTION = worker_pb2.ConnectResponse(
    incarnation="one", agent_name="a/one", agent_metadata=b"m", total_blocks=4, pool_address=2**40,
    memory_type="DRAM", transport="nixl", layout=worker_pb2.KvLayout(block_size=16, block_bytes=64),
)  # fmt: skip
PUBLIC = inference_pb2.SamplingParams(
    max_tokens=5, temperature=0.5, logit_bias={5: 1.0}, stop=["a"], n=2,
    structured_outputs=inference_pb2.StructuredOutputs(choice=inference_pb2.Alternatives(texts=["a", "b"])),
)  # fmt: skip


def messages(seed: Kind) -> st.SearchStrategy[Kind]:
    """Messages that nearly look like `seed`, of those bytes that are messages at all."""

    def parsed(data: bytes) -> Kind | None:
        try:
            return type(seed).FromString(data)
        except DecodeError:
            return None

    return mutated([seed.SerializeToString()]).map(parsed).filter(lambda found: found is not None)  # type: ignore[return-value]


def refused(use: Callable[[], object]) -> bool:
    """Whether it was refused in the way that services answer with a code and go on after."""
    try:
        use()
    except BatonError:
        return True
    return False


@explore(start=messages(START))
def test_a_start_becomes_a_sequence_or_a_refusal(start: worker_pb2.Start) -> None:
    if not refused(lambda: context_from(start.prompt_token_ids, start.output_token_ids, 512, 64)):
        assert 0 < len(start.prompt_token_ids) + len(start.output_token_ids) < 64
        assert max([*start.prompt_token_ids, *start.output_token_ids]) < 512
    if not refused(lambda: sampling_from(start.sampling, 512)):
        sampling = sampling_from(start.sampling, 512)
        assert sampling.max_tokens >= 1
        assert math.isfinite(sampling.temperature)


@explore(beat=messages(BEAT))
def test_a_worker_that_is_let_in_can_be_routed_to(beat: kvstore_pb2.Beat) -> None:
    if refused(lambda: check_worker(beat.worker)):
        return
    view = worker_view(beat.worker, beat.load, beat.draining, dict(beat.read_bytes_per_s))
    request = Request(prompt_tokens=100, blocks=7, block_size=16, block_bytes=64)
    cluster = ClusterView((view,))
    try:
        create_policy("prefix", random.Random(1)).place(request, cluster)
    except Unplaceable:
        return


@explore(
    first=messages(EVENTS),
    second=messages(EVENTS),
    beat=messages(BEAT),
    chains=messages(kvstore_pb2.FoundChains(chains=[ID * 3, ID])),
)
def test_the_kvstore_takes_or_refuses_any_events(
    first: kvstore_pb2.IndexEvents,
    second: kvstore_pb2.IndexEvents,
    beat: kvstore_pb2.Beat,
    chains: kvstore_pb2.FoundChains,
) -> None:
    state = ClusterState(MemoryBackend(), 1 << 20)
    if refused(lambda: check_worker(beat.worker)):
        return
    session = state.join(beat.worker, beat.load, beat.draining)
    state.beat(session, beat)
    replica = PrefixIndex()
    for wire in (first, second):
        if not refused(lambda wire=wire: decode_events(wire)):
            refused(lambda wire=wire: state.publish(decode_events(wire), wire))
            replica.apply(decode_events(wire))
    if not refused(lambda: decode_chains(chains)):
        state.use(decode_chains(chains))
    state.leave(session)


@explore(description=messages(DESCRIPTION))
def test_a_description_of_memory_is_taken_or_refused(description: worker_pb2.ConnectResponse) -> None:
    refused(lambda: description_from_proto(description))


@explore(params=messages(PUBLIC))
def test_sampling_parameters_are_taken_or_refused(params: inference_pb2.SamplingParams) -> None:
    refused(lambda: _sampling_fields(params))
