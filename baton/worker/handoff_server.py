"""Kv: the serving side of handoffs. The stream is the lease on the blocks it named."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from baton.engine.interfaces import Output
from baton.engine.sequence import Work
from baton.errors import BatonError, HandoffFailed, Misguided, PrefillRefused, Unavailable
from baton.kv.hashing import extend_chain
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.transfer.wire import description_to_proto
from baton.worker.convert import first_token_to
from baton.worker.move import HandoffContext, give
from baton.worker.pull import Puller
from baton.worker.state import WorkerState
from baton.worker.traces import trace_prefill

log = logging.getLogger(__name__)


class KvService(worker_pb2_grpc.KvServicer):
    """Prefills prompts for other workers, or names cached blocks, and keeps them until each has read them."""

    def __init__(self, state: WorkerState, puller: Puller) -> None:
        self._state = state
        self._puller = puller

    async def Connect(
        self, request: worker_pb2.ConnectRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ConnectResponse:
        log.info("%s connects to read KV", request.reader_id)
        return description_to_proto(self._state.transfer.describe())

    async def Handoff(
        self,
        request_iterator: AsyncIterator[worker_pb2.HandoffRequest],
        context: HandoffContext,
    ) -> None:
        self._state.handoffs_serving += 1
        try:
            message = await anext(aiter(request_iterator), None)
            if message is None or not message.HasField("begin"):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be begin")
            self._check(message.begin)
            match message.begin.purpose:
                case worker_pb2.PULL:
                    await self._lend(message.begin, request_iterator, context)
                case worker_pb2.MOVE:
                    await give(self._state, message.begin, request_iterator, context)
                case _:
                    await self._prefill(message.begin, request_iterator, context)
        except (PrefillRefused, Misguided) as error:
            await context.abort(error.grpc_code, error.message)
        except HandoffFailed as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
        except BatonError as error:
            await context.abort(error.grpc_code, error.message)
        finally:
            self._state.handoffs_serving -= 1

    async def _prefill(
        self,
        begin: worker_pb2.Begin,
        requests: AsyncIterator[worker_pb2.HandoffRequest],
        context: HandoffContext,
    ) -> None:
        """Prefill, announce, wait for Done. However this ends, the blocks are freed after it."""
        state, lease = self._state, _Lease()
        self._check_role()
        choice = state.choice(begin, lease, Work.PREFILL)
        choice.announced = begin.held_blocks
        await state.guide(choice)
        if begin.HasField("pull"):
            await self._puller.pull(choice, begin.pull)
        self._check_role()

        def heed() -> None:
            if not state.takes_prompts and state.engine.withdraw(choice):
                lease.refuse(self._refusal())

        state.engine.submit(choice)
        try:
            with state.told(heed):
                while not await self._announce(output := await lease.next(), begin, context):
                    pass
            self._state.metrics.began(output)
            trace_prefill(choice, self._state.worker_id)
            if output.finish_reason is not None:
                return
            await _release(requests, context)
        finally:
            self._state.engine.cancel(choice)

    async def _announce(self, output: Output, begin: worker_pb2.Begin, context: HandoffContext) -> bool:
        """Send the first token, then the blocks; True when nothing follows.

        Raises:
            Misguided: the first token cannot be held to the grammar.
            Unavailable: the prefill failed.
        """
        if output.misguided:
            raise Misguided(output.error)
        if output.error:
            raise Unavailable(f"prefill failed: {output.error}")
        if output.sampled is not None:
            await context.write(worker_pb2.HandoffResponse(first_token=first_token_to(output)))
        last = output.sampled is not None
        if output.finish_reason is None and (output.ready is not None or last):
            ready = worker_pb2.BlocksReady(last=last)
            if output.ready is not None:
                ready.first_index = output.ready.first_index
                ready.block_ids.extend(output.ready.blocks)
            ready = await self._state.named(ready, begin)
            await context.write(worker_pb2.HandoffResponse(blocks_ready=ready))
        return last

    async def _lend(
        self,
        begin: worker_pb2.Begin,
        requests: AsyncIterator[worker_pb2.HandoffRequest],
        context: HandoffContext,
    ) -> None:
        """Name cached blocks beyond those the reader has, wait for Done. Computes nothing."""
        state = self._state
        chain = extend_chain(
            state.layout.root(begin.cache_salt), begin.prompt_token_ids, state.layout.block_size
        )
        pinning = state.engine.pin_all(chain[: begin.pull_blocks])
        try:
            pinned = await asyncio.wrap_future(pinning)
            if pinned.held <= begin.held_blocks:
                await context.abort(
                    grpc.StatusCode.NOT_FOUND, "no more blocks of this prefix are cached here"
                )
            ready = worker_pb2.BlocksReady(
                first_index=begin.held_blocks, block_ids=pinned.blocks[begin.held_blocks :], last=True
            )
            ready = await state.named(ready, begin)
            await context.write(worker_pb2.HandoffResponse(blocks_ready=ready))
            pinned.copied = await _release(requests, context)
        finally:
            pinning.add_done_callback(lambda done: state.engine.unpin(done.result()))

    def _check(self, begin: worker_pb2.Begin) -> None:
        state = self._state
        if begin.incarnation != state.incarnation:
            _refuse(f"this is incarnation {state.incarnation}, not {begin.incarnation}")

    def _check_role(self) -> None:
        if not self._state.takes_prompts:
            raise self._refusal()

    def _refusal(self) -> PrefillRefused:
        state = self._state
        why = "drains" if state.draining else f"has role {state.role.value}"
        return PrefillRefused(f"worker {state.worker_id} {why} and prefills for nobody else")


class _Lease:
    """Receives the outputs of one handoff's prefill."""

    def __init__(self) -> None:
        self._outputs: asyncio.Queue[Output | PrefillRefused] = asyncio.Queue()

    def deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._outputs.put_nowait(output)

    def refuse(self, refusal: PrefillRefused) -> None:
        self._outputs.put_nowait(refusal)

    async def next(self) -> Output:
        output = await self._outputs.get()
        if isinstance(output, PrefillRefused):
            raise output
        return output


async def _release(requests: AsyncIterator[worker_pb2.HandoffRequest], context: HandoffContext) -> bool:
    """Answer Done with Released; False, and nothing is said, when the reader went away instead."""
    message = await anext(aiter(requests), None)
    if message is None or not message.HasField("done"):
        return False
    await context.write(worker_pb2.HandoffResponse(released=worker_pb2.Released()))
    return True


def _refuse(message: str) -> NoReturn:
    raise HandoffFailed(message)
