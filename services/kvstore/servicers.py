"""The kvstore's gRPC services: streams in and out of `ClusterState`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.errors import BatonError, InvalidRequest
from baton.kv.events import Verdict
from baton.rpc.kvstore_messages import check_worker, decode_chains, decode_events
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc
from services.kvstore.feeds import TooSlow
from services.kvstore.liveness import SignsOfLife
from services.kvstore.metrics import Metrics
from services.kvstore.state import ClusterState

Context = grpc.aio.ServicerContext[Any, Any]


class RegistryServicer(kvstore_pb2_grpc.RegistryServicer):
    """baton.v1.Registry. A worker that sends no beat for `ttl_s` seconds is gone."""

    def __init__(self, state: ClusterState, metrics: Metrics, ttl_s: float) -> None:
        self._state = state
        self._metrics = metrics
        self._ttl_s = ttl_s

    async def Join(
        self, request_iterator: AsyncIterator[kvstore_pb2.Beat], context: Context
    ) -> AsyncIterator[kvstore_pb2.JoinReply]:
        try:
            async with SignsOfLife(self._ttl_s) as life:
                first = await anext(request_iterator, None)
                if first is None:
                    return
                check_worker(first.worker)
                session = self._state.join(first.worker, first.load, first.draining)
                try:
                    yield kvstore_pb2.JoinReply(ttl_s=self._ttl_s)
                    async for beat in request_iterator:
                        life.seen()
                        if beat.HasField("worker"):
                            check_worker(beat.worker)
                        self._state.beat(session, beat)
                finally:
                    self._state.leave(session)
        except BatonError as error:
            await context.abort(error.grpc_code, error.message)

    async def Watch(
        self, request: kvstore_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[kvstore_pb2.RegistryUpdate]:
        try:
            with self._state.watch() as feed:
                yield self._state.membership()
                while True:
                    yield await feed.next()
        except TooSlow as error:
            self._metrics.slow_subscribers.inc()
            await context.abort(error.grpc_code, error.message)


class PrefixIndexServicer(kvstore_pb2_grpc.PrefixIndexServicer):
    """baton.v1.PrefixIndex."""

    def __init__(self, state: ClusterState, metrics: Metrics) -> None:
        self._state = state
        self._metrics = metrics

    async def Publish(
        self, request_iterator: AsyncIterator[kvstore_pb2.IndexEvents], context: Context
    ) -> AsyncIterator[kvstore_pb2.PublishReply]:
        worker: tuple[str, str] | None = None
        asked = False
        try:
            async for wire in request_iterator:
                message = decode_events(wire)
                worker = worker or (message.worker_id, message.incarnation)
                if worker != (message.worker_id, message.incarnation):
                    raise InvalidRequest("one Publish stream carries one worker", field="worker_id")
                verdict = self._state.publish(message, wire)
                self._metrics.messages.labels(verdict.value).inc()
                # What was sent before the worker heard of the resync needs no second one.
                if verdict is not Verdict.RESYNC:
                    asked = False
                    yield kvstore_pb2.PublishReply(acknowledged=message.sequence)
                elif not asked:
                    asked = True
                    yield kvstore_pb2.PublishReply(resync=True)
        except BatonError as error:
            await context.abort(error.grpc_code, error.message)

    async def Subscribe(
        self, request: kvstore_pb2.SubscribeRequest, context: Context
    ) -> AsyncIterator[kvstore_pb2.IndexUpdate]:
        try:
            with self._state.subscribe() as feed:
                for pieces in self._state.listing(feed):
                    for piece in pieces:
                        yield piece
                    while (update := feed.next_now()) is not None:
                        yield update
                yield kvstore_pb2.IndexUpdate(snapshot_done=True)
                while True:
                    yield await feed.next()
        except TooSlow as error:
            self._metrics.slow_subscribers.inc()
            await context.abort(error.grpc_code, error.message)

    async def ReportFound(
        self, request_iterator: AsyncIterator[kvstore_pb2.FoundChains], context: Context
    ) -> kvstore_pb2.ReportFoundReply:
        try:
            async for message in request_iterator:
                chains = decode_chains(message)
                self._state.use(chains)
                self._metrics.found_chains.inc(len(chains))
        except BatonError as error:
            await context.abort(error.grpc_code, error.message)
        return kvstore_pb2.ReportFoundReply()
