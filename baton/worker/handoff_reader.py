"""The reading side of a handoff: from Begin to KV that may be decoded from.

The stream is the lease. What was read counts only after Released; whatever else ends the stream, the
blocks are given back unused and the router is asked for another placement.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

import grpc

from baton import tracing
from baton.engine.engine import Engine
from baton.engine.reservations import Reservation
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import longest_reusable
from baton.errors import HandoffFailed, Misguided, PrefillRefused
from baton.rpc.v1 import inference_pb2, worker_pb2
from baton.worker.convert import forwarded_to, remaining_s
from baton.worker.metrics import HANDOFF_PHASES, HANDOFFS, PREFILLS
from baton.worker.peers import HandoffCall, Peer, Peers
from baton.worker.state import WorkerState

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Send = Callable[[worker_pb2.RequestOutput], None]


class HandoffReader:
    """Reads prompts' KV from prefill workers into this worker's pool."""

    def __init__(self, state: WorkerState, peers: Peers, timeout_s: float) -> None:
        self._state = state
        self._peers = peers
        self._timeout_s = timeout_s
        self._complete: dict[Choice, Reservation] = {}

    async def read(
        self, start: worker_pb2.Start, choice: Choice, send: Send
    ) -> worker_pb2.TransferReport | None:
        """Bring the KV of the request's context here and `send` its first token on the way.

        Returns None when the request ended with that token. Otherwise the KV is complete, the token
        is in `choice`, and `adopt` must be called next. Cancelling the call is safe at any point: no
        block is given back while a read may still write to it.

        Raises:
            HandoffFailed: nothing was kept; the token may have been sent.
        """
        state = self._state
        clock = _Clock()
        chain = choice.chain(longest_reusable(choice.tokens, choice.block_size))
        reservation = await pin_prefix(state.engine, [] if choice.wants_prompt_logprobs else chain)
        state.handoffs_reading += 1
        outcome = "cancelled"
        try:
            peer = await self._peers.get(start.prefill_address, start.prefill_incarnation)
            exchange = _Exchange(
                state, self._peers, peer, start, choice, reservation, send, self._timeout_s, clock
            )
            finished = await exchange.run()
            outcome = "released"
            if finished:
                return None
            self._complete[choice] = reservation
            return exchange.report
        except HandoffFailed as error:
            outcome = "failed"
            log.warning("request %s: %s", start.request_id, error.message)
            raise
        finally:
            state.handoffs_reading -= 1
            HANDOFFS.labels(outcome).inc()
            if start.traceparent:
                clock.trace(start.traceparent, {"worker": state.worker_id, "outcome": outcome})
            if choice not in self._complete:
                state.engine.drop(reservation)

    def adopt(self, choice: Choice) -> None:
        """Start decoding a choice whose `read` completed."""
        self._state.engine.adopt(self._complete.pop(choice), choice)


@dataclass
class _Clock:
    """Tells the phases of one handoff apart."""

    last_s: float = field(default_factory=time.monotonic)
    phases: list[tuple[str, float, float]] = field(default_factory=list)

    def ended(self, phase: str) -> float:
        """Count the seconds since the phase before; returns them."""
        now_s = time.monotonic()
        took_s = now_s - self.last_s
        self.phases.append((phase, self.last_s, now_s))
        self.last_s = now_s
        HANDOFF_PHASES[phase].observe(took_s)
        return took_s

    def trace(self, parent: str, facts: tracing.Attributes) -> None:
        """Record the handoff and its phases as spans."""
        began_s = self.phases[0][1] if self.phases else self.last_s
        handoff = tracing.record(parent, "handoff", began_s, time.monotonic(), facts)
        for phase in self.phases:
            tracing.record(handoff, *phase)


@dataclass
class _Exchange:
    """One Handoff stream, as seen by the reader."""

    state: WorkerState
    peers: Peers
    peer: Peer
    start: worker_pb2.Start
    choice: Choice
    reservation: Reservation
    send: Send
    timeout_s: float
    clock: _Clock
    report: worker_pb2.TransferReport = field(default_factory=worker_pb2.TransferReport)

    async def run(self) -> bool:
        try:
            with self.peer.handoff() as call:
                return await self._run(call)
        except grpc.aio.AioRpcError as error:
            raise _broken(self.peer, error) from error
        except ExceptionGroup as group:
            raise _first_failure(group, self.peer) from group

    async def _run(self, call: HandoffCall) -> bool:
        ready: asyncio.Queue[worker_pb2.BlocksReady] = asyncio.Queue()
        await call.write(worker_pb2.HandoffRequest(begin=self._begin()))
        self.clock.ended("begin")
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read_blocks(ready))
            finished = await self._receive(call, ready)
            if finished:
                reading.cancel()
                return True
            await while_leased(call, self.peer, reading)
            tail_s = self.clock.ended("tail")
            await call.write(worker_pb2.HandoffRequest(done=worker_pb2.Done()))
            released = await next_response(call, self.peer, self.timeout_s)
            if released.WhichOneof("message") != "released":
                raise HandoffFailed(f"{self.peer} answered Done with something other than Released")
            self.report.tail_s = tail_s + self.clock.ended("release")
        return False

    async def _receive(
        self,
        call: HandoffCall,
        ready: asyncio.Queue[worker_pb2.BlocksReady],
    ) -> bool:
        """Take messages up to the last BlocksReady; True when the first token ended the request."""
        while True:
            response = await next_response(call, self.peer, self.timeout_s)
            match response.WhichOneof("message"):
                case "first_token":
                    first = response.first_token
                    self.clock.ended("first_token")
                    self.send(forwarded_to(self.start.key, first))
                    PREFILLS.labels("remote").inc()
                    if first.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
                        return True
                    self.choice.append(first.token_id)
                    self.choice.started = True
                case "blocks_ready":
                    ready.put_nowait(response.blocks_ready)
                    if response.blocks_ready.last:
                        return False
                case other:
                    raise HandoffFailed(f"{self.peer} sent {other} before the blocks were done")

    async def _read_blocks(self, ready: asyncio.Queue[worker_pb2.BlocksReady]) -> None:
        """Read every announced range into blocks that are allocated when the first one arrives."""
        expected = self.reservation.held
        total = self.choice.blocks_for(len(self.choice.tokens))
        while True:
            message = await ready.get()
            if message.first_index != expected or expected + len(message.block_ids) > total:
                raise HandoffFailed(
                    f"{self.peer} announced blocks {message.first_index}..+{len(message.block_ids)} where "
                    f"{expected} of {total} were next"
                )
            if message.block_ids:
                if self.reservation.granted is None:
                    granted = asyncio.wrap_future(self.state.engine.reserve(self.reservation, total))
                    async with asyncio.timeout(self.timeout_s):
                        await granted
                await self._read(message)
                expected += len(message.block_ids)
            if message.last:
                if expected != total:
                    raise HandoffFailed(f"{self.peer} announced {expected} of {total} blocks")
                return

    async def _read(self, message: worker_pb2.BlocksReady) -> None:
        first = message.first_index
        destination = self.reservation.blocks[first : first + len(message.block_ids)]
        source = list(message.block_ids)
        report = await self.peers.read(self.peer, source, destination, self.timeout_s, message.digests)
        self.report.bytes += report.bytes
        self.report.read_s += report.seconds

    def _begin(self) -> worker_pb2.Begin:
        return worker_pb2.Begin(
            request_id=self.start.request_id,
            incarnation=self.peer.incarnation,
            prompt_token_ids=self.start.prompt_token_ids,
            output_token_ids=self.start.output_token_ids,
            sampling=self.start.sampling,
            cache_salt=self.start.cache_salt,
            timeout_s=remaining_s(self.choice),
            held_blocks=self.reservation.held,
            verify=self.peers.verify,
            traceparent=self.start.traceparent,
            pull=self.start.pull if self.start.HasField("pull") else None,
        )


async def pin_prefix(engine: Engine, chain: Sequence[bytes]) -> Reservation:
    """Pin what this worker holds of the chain, after bringing it up from lower tiers."""
    pinning = engine.pin_all(chain)
    try:
        await asyncio.wrap_future(pinning)
        return engine.pin_prefix(chain)
    finally:
        pinning.add_done_callback(lambda done: engine.unpin(done.result()))


async def while_leased(call: HandoffCall, peer: Peer, reading: Awaitable[Result]) -> Result:
    """What `reading` comes to, while the peer has nothing to say.

    A peer that vanished is found on its stream, by keepalive. A read from it would wait for its own deadline.

    Raises:
        HandoffFailed: the stream ended, and `reading` was cancelled; or it failed.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(_until_ended(call, peer))
            result = await reading
            watching.cancel()
    except ExceptionGroup as group:
        raise _first_failure(group, peer) from group
    return result


async def _until_ended(call: HandoffCall, peer: Peer) -> NoReturn:
    raise _ended(peer, await call.code(), await call.details())


async def next_response(call: HandoffCall, peer: Peer, timeout_s: float) -> worker_pb2.HandoffResponse:
    """What `peer` says next on a handoff.

    Raises:
        PrefillRefused: it takes no prompts now.
        HandoffFailed: it ended the stream, or said nothing for `timeout_s` seconds.
    """
    try:
        async with asyncio.timeout(timeout_s):
            response = await call.read()
    except TimeoutError as error:
        raise HandoffFailed(f"{peer} sent nothing for {timeout_s:g} s") from error
    if isinstance(response, worker_pb2.HandoffResponse):
        return response
    raise _ended(peer, await call.code(), await call.details())


def _broken(peer: Peer, error: grpc.aio.AioRpcError) -> HandoffFailed:
    return _ended(peer, error.code(), error.details() or "")


def _ended(peer: Peer, code: grpc.StatusCode, details: str) -> HandoffFailed:
    """Why a handoff is over: refused, or broken."""
    if code is PrefillRefused.grpc_code:
        return PrefillRefused(f"{peer}: {details}")
    if code is Misguided.grpc_code:
        return Misguided(details)
    return HandoffFailed(f"{peer} ended the handoff: {code.name}: {details}")


def _first_failure(group: ExceptionGroup[Exception], peer: Peer) -> HandoffFailed:
    """What went wrong first, as the one error a handoff fails with."""
    for error in group.exceptions:
        if isinstance(error, HandoffFailed):
            return error
        if isinstance(error, grpc.aio.AioRpcError):
            return _broken(peer, error)
        if isinstance(error, TimeoutError):
            return HandoffFailed("no KV blocks became free for the handoff in time")
    return HandoffFailed(f"{peer}: {group.exceptions[0]!r}")
