"""How a choice moves, with its KV, from the worker that decodes it to another; both ends of it.

The one that decodes names the complete blocks and goes on; the other reads them, then asks it to stop. What
has been computed meanwhile, the last and incomplete block too, is read while the choice stands still, and
after Released it goes on at the other end with the very next token. If the stream ends before, it goes on
where it was, and what was read is given back unused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc

from baton.engine.reservations import Pinned, Reservation
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import longest_reusable
from baton.errors import BatonError, HandoffFailed
from baton.rpc.v1 import worker_pb2
from baton.worker.handoff_reader import next_response, pin_prefix, while_leased
from baton.worker.metrics import MOVES
from baton.worker.peers import HandoffCall, Peer, Peers
from baton.worker.state import WorkerState

log = logging.getLogger(__name__)

HandoffContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.HandoffRequest, worker_pb2.HandoffResponse]"

# A choice stands still no longer than this for a reader that says nothing.
_FROZEN_S = 3.0
# Blocks taken beyond the context's, for the tokens that come while it is read.
_SPARE_BLOCKS = 2


class Mover:
    """Takes choices over from workers that give them up."""

    def __init__(self, state: WorkerState, peers: Peers, timeout_s: float) -> None:
        self._state = state
        self._peers = peers
        self._timeout_s = timeout_s

    async def take(self, start: worker_pb2.Start, choice: Choice) -> tuple[Reservation, int]:
        """Bring all KV of the choice that `start.move_from` names here, and its tokens into `choice`.

        Returns the reservation to adopt it with, before anything else is awaited, and how many blocks were
        read. Cancelling the call is safe at any point.

        Raises:
            HandoffFailed: nothing was kept; the choice goes on where it was, or ends there.
        """
        state, source = self._state, start.move_from
        chain = choice.chain(longest_reusable(choice.tokens, choice.block_size))
        reservation = await pin_prefix(state.engine, chain)
        state.handoffs_reading += 1
        outcome = "cancelled"
        try:
            peer = await self._peers.get(source.address, source.incarnation)
            read_blocks = await self._exchange(peer, start, choice, reservation)
            outcome = "moved"
            return reservation, read_blocks
        except BatonError as error:
            outcome = "failed"
            log.warning("request %s was not moved here: %s", start.request_id, error.message)
            raise
        finally:
            state.handoffs_reading -= 1
            MOVES.labels(outcome).inc()
            if outcome != "moved":
                state.engine.drop(reservation)

    async def _exchange(
        self, peer: Peer, start: worker_pb2.Start, choice: Choice, reservation: Reservation
    ) -> int:
        try:
            with peer.handoff() as call:
                held = reservation.held
                begin = _begin(peer, start, choice, held, self._peers.verify)
                await call.write(worker_pb2.HandoffRequest(begin=begin))
                held += await self._read(call, peer, reservation, held, _SPARE_BLOCKS)
                await call.write(worker_pb2.HandoffRequest(freeze=worker_pb2.Freeze()))
                _go_on_from(choice, (await next_response(call, peer, self._timeout_s)).moved)
                held += await self._read(call, peer, reservation, held, 0)
                if held != choice.blocks_for(len(choice.tokens) - 1):
                    raise HandoffFailed(f"{peer} gave {held} blocks for {len(choice.tokens)} tokens")
                await call.write(worker_pb2.HandoffRequest(done=worker_pb2.Done()))
                if (await next_response(call, peer, self._timeout_s)).WhichOneof("message") != "released":
                    raise HandoffFailed(f"{peer} answered Done with something other than Released")
                return held - reservation.held
        except grpc.aio.AioRpcError as error:
            raise HandoffFailed(f"{peer}: {error.code().name}: {error.details()}") from error
        except TimeoutError as error:
            raise HandoffFailed("no KV blocks became free for the move in time") from error

    async def _read(
        self, call: HandoffCall, peer: Peer, reservation: Reservation, held: int, spare: int
    ) -> int:
        """Read what is announced next, from block `held` on; how many blocks that were."""
        ready = (await next_response(call, peer, self._timeout_s)).blocks_ready
        count = len(ready.block_ids)
        if ready.first_index != held:
            raise HandoffFailed(f"{peer} announced block {ready.first_index} where {held} was next")
        if held + count + spare > len(reservation.blocks):
            granted = asyncio.wrap_future(self._state.engine.reserve(reservation, held + count + spare))
            async with asyncio.timeout(self._timeout_s):
                await granted
        destination = reservation.blocks[held : held + count]
        if count:
            source = list(ready.block_ids)
            reading = self._peers.read(peer, source, destination, self._timeout_s, ready.digests)
            await while_leased(call, peer, reading)
        return count


def _begin(peer: Peer, start: worker_pb2.Start, choice: Choice, held: int, verify: bool) -> worker_pb2.Begin:
    source = start.move_from
    return worker_pb2.Begin(
        request_id=choice.request_id,
        incarnation=peer.incarnation,
        prompt_token_ids=start.prompt_token_ids,
        output_token_ids=start.output_token_ids,
        cache_salt=choice.cache_salt,
        held_blocks=held,
        purpose=worker_pb2.MOVE,
        move=worker_pb2.Move(router_id=source.router_id, key=source.key),
        traceparent=start.traceparent,
        verify=verify,
    )


def _go_on_from(choice: Choice, moved: worker_pb2.Moved) -> None:
    """Bring `choice` to where it was stopped."""
    known = choice.tokens[choice.prompt_len :]
    outputs = list(moved.output_token_ids)
    if not outputs or outputs[: len(known)] != known:
        raise HandoffFailed("the choice was stopped elsewhere than where its tokens lead")
    for token in outputs[len(known) :]:
        choice.append(token)
    choice.started = True


async def give(
    state: WorkerState,
    begin: worker_pb2.Begin,
    requests: AsyncIterator[worker_pb2.HandoffRequest],
    context: HandoffContext,
) -> None:
    """Serve a Begin that asks for a choice which decodes here. Without Done it goes on here.

    Raises:
        HandoffFailed: it does not decode here.
    """
    session = state.routers.get(begin.move.router_id)
    if session is None:
        raise HandoffFailed(f"router {begin.move.router_id} has no session here")
    with session.giving(begin.move.key) as choice:
        if not _is_asked_for(choice, begin):
            raise HandoffFailed("the request that decodes here is another one")
        pinned = state.engine.pin_computed(choice)
        if pinned is None:
            raise HandoffFailed("the request does not decode here, or not yet")
        try:
            if await _give(state, choice, pinned, begin, requests, context):
                pinned.copied = choice.copied = True
                if session.moved(begin.move.key):
                    await context.write(worker_pb2.HandoffResponse(released=worker_pb2.Released()))
        except TimeoutError:
            raise HandoffFailed(f"the reader said nothing for {_FROZEN_S:g} s") from None
        finally:
            state.engine.thaw(choice)
            state.engine.unpin(pinned)


async def _give(
    state: WorkerState,
    choice: Choice,
    pinned: Pinned,
    begin: worker_pb2.Begin,
    requests: AsyncIterator[worker_pb2.HandoffRequest],
    context: HandoffContext,
) -> bool:
    """Name the choice's blocks that the reader lacks, and freeze it on the way. Whether it has them all now.

    Raises:
        HandoffFailed: it ended before it could be frozen.
        TimeoutError: the reader keeps it frozen for too long.
    """
    held = begin.held_blocks

    async def announce(first: int, blocks: list[int], *, last: bool) -> None:
        ready = worker_pb2.BlocksReady(first_index=first, block_ids=blocks, last=last)
        await context.write(worker_pb2.HandoffResponse(blocks_ready=await state.named(ready, begin)))

    await announce(held, pinned.blocks[held:], last=False)
    message = await anext(aiter(requests), None)
    if message is None or not message.HasField("freeze"):
        return False
    async with asyncio.timeout(_FROZEN_S):
        if not await asyncio.wrap_future(state.engine.freeze(choice)):
            raise HandoffFailed("the request ended, or stopped decoding, before it could be moved")
        moved = worker_pb2.Moved(output_token_ids=choice.tokens[choice.prompt_len :])
        await context.write(worker_pb2.HandoffResponse(moved=moved))
        named = max(held, len(pinned.blocks))
        rest = choice.blocks[named : choice.blocks_for(len(choice.tokens) - 1)]
        await announce(named, rest, last=True)
        message = await anext(aiter(requests), None)
    return message is not None and message.HasField("done")


def _is_asked_for(choice: Choice, begin: worker_pb2.Begin) -> bool:
    """Whether the choice is the one that the reader means: its KV would be taken for that of these tokens."""
    asked = [*begin.prompt_token_ids, *begin.output_token_ids]
    return (
        choice.request_id == begin.request_id
        and choice.cache_salt == begin.cache_salt
        and choice.prompt_len == len(begin.prompt_token_ids)
        and choice.tokens[: len(asked)] == asked
    )
