"""What the kvstore answers to calls that its clients never make, and to operators."""

from __future__ import annotations

from contextlib import AsyncExitStack

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from baton.kv.events import Stored
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc, worker_pb2
from tests.integration.kvstore_processes import (
    KvstoreProcess,
    until,
)
from tests.integration.kvstore_workers import (
    TTL_S,
    Publisher,
    running,
    watch,
)


class Calls:
    """Raw calls to a kvstore, for what the clients never do."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.registry = kvstore_pb2_grpc.RegistryStub(channel)
        self.index = kvstore_pb2_grpc.PrefixIndexStub(channel)

    async def refusal(
        self, call: grpc.aio.StreamStreamCall | grpc.aio.StreamUnaryCall, *messages: object
    ) -> tuple[str, str]:
        for message in messages:
            await call.write(message)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            if isinstance(call, grpc.aio.StreamUnaryCall):
                await call
            else:
                async for _ in call:
                    pass
        return error.value.code().name, error.value.details() or ""


WORKER = kvstore_pb2.Worker(
    worker_id="w", incarnation="1", address="127.0.0.1:1", role=worker_pb2.ROLE_DECODE
)


def events(**fields: object) -> kvstore_pb2.IndexEvents:
    given = {"worker_id": "w", "incarnation": "1", "sequence": 1, "snapshot": True, **fields}
    return kvstore_pb2.IndexEvents(**given)  # type: ignore[arg-type]


def altered(**fields: object) -> kvstore_pb2.Beat:
    worker = kvstore_pb2.Worker()
    worker.CopyFrom(WORKER)
    worker.MergeFrom(kvstore_pb2.Worker(**fields))  # type: ignore[arg-type]
    return kvstore_pb2.Beat(worker=worker)


async def test_messages_that_make_no_sense_are_refused_and_the_kvstore_goes_on(
    memory_kvstore: KvstoreProcess,
) -> None:
    stored = kvstore_pb2.IndexEvent.STORED
    device = kvstore_pb2.TIER_DEVICE
    bad_events = {
        "block_ids": [
            events(events=[{"kind": stored, "tier": device, "block_ids": b"x" * 17}]),
            events(events=[{"kind": stored, "tier": device, "block_ids": b"x" * 16 * 65_537}]),
        ],
        "kind": [events(events=[{"kind": 0, "tier": device}]), events(events=[{"kind": 9, "tier": device}])],
        "tier": [events(events=[{"kind": stored, "tier": 0}]), events(events=[{"kind": stored, "tier": 8}])],
        "sequence": [events(sequence=0)],
        "worker_id": [events(worker_id=""), events(worker_id="w" * 257)],
        "incarnation": [events(incarnation="")],
        "events": [events(events=[{"kind": 3}] * 16_385)],
    }
    point = {"size": 5, "seconds": 1.0}
    bad_beats = {
        "worker_id": [kvstore_pb2.Beat(), altered(worker_id="w" * 257)],
        "role": [altered(role=7)],
        "prefill_curve": [altered(prefill_curve=[point, point]), altered(prefill_curve=[{"size": 0}])],
        "decode_curve": [altered(decode_curve=[{"size": 1, "seconds": float("nan")}])],
    }
    async with AsyncExitStack() as stack:
        calls = Calls(await stack.enter_async_context(grpc.aio.insecure_channel(memory_kvstore.address)))
        join = calls.registry.Join()
        await join.write(kvstore_pb2.Beat(worker=WORKER))
        assert (await join.read()).ttl_s == TTL_S
        for field, messages in bad_events.items():
            for message in messages:
                code, details = await calls.refusal(calls.index.Publish(), message)
                assert (code, field in details) == ("INVALID_ARGUMENT", True), (field, details)
        for field, beats in bad_beats.items():
            for beat in beats:
                code, details = await calls.refusal(calls.registry.Join(), beat)
                assert (code, field in details) == ("INVALID_ARGUMENT", True), (field, details)
        code, _ = await calls.refusal(calls.index.Publish(), events(), events(worker_id="v"))
        assert code == "INVALID_ARGUMENT"
        for chains in ([b"x" * 17], [b"x" * 16] * 65_537):
            code, details = await calls.refusal(
                calls.index.ReportFound(), kvstore_pb2.FoundChains(chains=chains)
            )
            assert (code, "chains" in details) == ("INVALID_ARGUMENT", True), details
        for stranger in (events(worker_id="v"), events(incarnation="2")):
            code, _ = await calls.refusal(calls.index.Publish(), stranger)
            assert code == "FAILED_PRECONDITION"
        publish = calls.index.Publish()
        await publish.write(events(sequence=7, snapshot=False))
        assert (await publish.read()).resync
        await publish.write(
            events(sequence=9, events=[{"kind": stored, "tier": device, "block_ids": b"x" * 32}])
        )
        assert (await publish.read()).acknowledged == 9
        await publish.write(events(sequence=11, snapshot=False))
        assert (await publish.read()).resync
        join.cancel()
        publish.cancel()
        seen = watch(memory_kvstore)
        async with running(seen):
            await seen.ready()
            await until(lambda: not seen.peers, "the worker is gone")


async def test_a_subscriber_that_does_not_read_is_cut_off_and_the_others_are_not(
    memory_kvstore: KvstoreProcess,
) -> None:
    a, seen = Publisher(memory_kvstore.address, "a"), watch(memory_kvstore)
    ids = [number.to_bytes(16, "big") for number in range(60_000)]
    async with grpc.aio.insecure_channel(memory_kvstore.address) as channel, running(a.membership, seen):
        slow = Calls(channel).index.Subscribe(kvstore_pb2.SubscribeRequest())
        assert (await slow.read()).snapshot_done
        await until(
            lambda: (
                memory_kvstore.metric("baton_kvstore_messages_total", verdict="replace") == 1
                and seen.connected
            ),
            "all are there",
        )
        for count in range(30):
            a.membership.publish([Stored(ids)])
            await until(
                lambda count=count: (
                    (memory_kvstore.metric("baton_kvstore_messages_total", verdict="apply") or 0) > count
                ),
                "the kvstore has taken it",
            )
        with pytest.raises(grpc.aio.AioRpcError, match="subscribe again"):
            while True:
                await slow.read()
        await until(lambda: seen.index.lookup(ids) == {"a": 60_000}, "the other one has it")
        assert memory_kvstore.metric("baton_kvstore_slow_subscribers_total") == 1


async def test_health_reflection_and_metrics(memory_kvstore: KvstoreProcess) -> None:
    with grpc.insecure_channel(memory_kvstore.address) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert {"baton.v1.Registry", "baton.v1.PrefixIndex", "grpc.health.v1.Health"} <= names
        for service in ("", "baton.v1.Registry", "baton.v1.PrefixIndex"):
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=10
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert memory_kvstore.metric("baton_kvstore_workers") == 0
    assert memory_kvstore.metric("baton_kvstore_blocks") == 0
