"""Decode.Session: one router's stream of requests and the step outputs that answer them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from baton.engine.interfaces import Output
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import Work
from baton.errors import BatonError, HandoffFailed, InvalidRequest, Misguided, Overloaded, PrefillRefused
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.worker.convert import error_to, load_to, output_to
from baton.worker.handoff_reader import HandoffReader
from baton.worker.metrics import PREFILLS
from baton.worker.move import Mover
from baton.worker.pull import Puller
from baton.worker.state import WorkerState
from baton.worker.traces import trace_decode, trace_prefill

log = logging.getLogger(__name__)

# Outputs a router may leave unread; a live one reads them within a step or two.
_MAX_UNSENT = 65_536

_ERRORS: tuple[tuple[type[BatonError], worker_pb2.RequestError.Kind.ValueType], ...] = (
    (InvalidRequest, worker_pb2.RequestError.INVALID),
    (Misguided, worker_pb2.RequestError.INVALID),
    (Overloaded, worker_pb2.RequestError.OVERLOADED),
    (PrefillRefused, worker_pb2.RequestError.PREFILL_REFUSED),
    (HandoffFailed, worker_pb2.RequestError.HANDOFF_FAILED),
)


class DecodeService(worker_pb2_grpc.DecodeServicer):
    """Serves sessions; each ends with its stream and takes its requests with it."""

    def __init__(self, state: WorkerState, reader: HandoffReader, puller: Puller, mover: Mover) -> None:
        self._state = state
        self._sources = Sources(reader, puller, mover)

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        session = Session(self._state, self._sources)
        self._state.sessions += 1
        try:
            with self._state.told(session.heed):
                await session.serve(request_iterator, context)
        finally:
            self._state.sessions -= 1
            session.cancel_all()


@dataclass(frozen=True)
class Sources:
    """Where a request's KV may come from."""

    reader: HandoffReader
    puller: Puller
    mover: Mover


class _Over(Exception):
    """The worker ends the session."""


class Session:
    """The requests of one router on this worker. Owns their choices and handoff tasks."""

    def __init__(self, state: WorkerState, sources: Sources) -> None:
        self._state = state
        self._sources = sources
        self._router_id = ""
        self._ending = False
        self._given: set[int] = set()
        self._keys: dict[Choice, int] = {}
        self._choices: dict[int, Choice] = {}
        self._handoffs: dict[int, asyncio.Task[None]] = {}
        self._transfers: dict[Choice, worker_pb2.TransferReport] = {}
        self._outbox: list[worker_pb2.RequestOutput] = []
        self._filled = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    async def serve(
        self,
        requests: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Take messages until the router ends the stream, or this side has ended and everything is said."""
        self._serving = asyncio.current_task()
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write(context))
                try:
                    async for message in requests:
                        self._take(message, tasks)
                finally:
                    writer.cancel()
                    for task in self._handoffs.values():
                        task.cancel()
        except* _Over:
            pass
        finally:
            if self._state.routers.get(self._router_id) is self:
                del self._state.routers[self._router_id]

    def heed(self) -> None:
        """The worker takes other work than before: say so, and give up at once what it has not begun to
        decode and should not. What it decodes goes on until a worker that the router names takes it over."""
        self._filled.set()
        if self._state.takes_decode:
            return
        reason = f"worker {self._state.worker_id} gives up its requests"
        for key in list(self._handoffs):
            self._cancel(key)
            self._send(error_to(key, worker_pb2.RequestError.DRAINING, reason))
        for key, choice in list(self._choices.items()):
            if self._state.engine.withdraw(choice):
                self._forget(key)
                self._send(error_to(key, worker_pb2.RequestError.DRAINING, reason))

    def end(self) -> None:
        """End the stream once everything that there is to say has been written."""
        self._ending = True
        self._filled.set()

    @contextmanager
    def giving(self, key: int) -> Iterator[Choice]:
        choice = self._choices.get(key)
        if choice is None or key in self._given:
            raise HandoffFailed("no such request decodes here, or another worker is taking it over")
        self._given.add(key)
        try:
            yield choice
        finally:
            self._given.remove(key)

    def moved(self, key: int) -> bool:
        if key not in self._choices:
            return False
        self._send(error_to(key, worker_pb2.RequestError.MOVED, "another worker goes on with the request"))
        self._cancel(key)
        return True

    def _take(self, message: worker_pb2.SessionRequest, tasks: asyncio.TaskGroup) -> None:
        if message.HasField("hello"):
            self._router_id = message.hello.router_id
            self._state.routers[self._router_id] = self
            log.info("session with router %s", self._router_id)
            self._filled.set()
        for start in message.starts:
            self._start(start, tasks)
        for key in message.cancelled_keys:
            self._cancel(key)

    def deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            key = self._keys.get(output.choice)
            if key is None:
                continue  # cancelled while the step ran
            message = output_to(key, output)
            if message.HasField("prefill"):
                PREFILLS.labels(worker_pb2.PrefillReport.Kind.Name(message.prefill.kind).lower()).inc()
                self._state.metrics.began(output)
                trace_prefill(output.choice, self._state.worker_id)
            if self._transfers and (transfer := self._transfers.pop(output.choice, None)) is not None:
                message.transfer.CopyFrom(transfer)
            self._send(message)
            if output.finish_reason is not None:
                self._state.metrics.ended(output.choice)
                trace_decode(output.choice, self._state.worker_id, output.finish_reason.value)
            if output.finish_reason is not None or output.error:
                self._forget(key)

    def cancel_all(self) -> None:
        """Free what the session's requests hold; its handoff tasks have ended."""
        for key in list(self._choices):
            self._cancel(key)

    def _start(self, start: worker_pb2.Start, tasks: asyncio.TaskGroup) -> None:
        try:
            if not self._state.takes_decode:
                why = "drains" if self._state.draining else f"has role {self._state.role.value}"
                refusal = f"worker {self._state.worker_id} {why} and takes no decode work"
                self._send(error_to(start.key, worker_pb2.RequestError.DRAINING, refusal))
                return
            choice = self._state.choice(start, self, Work.GENERATE)
            fetches = start.prefill_address or start.HasField("pull") or start.HasField("move_from")
            if fetches or choice.sampling.grammar:
                self._state.engine.scheduler.require_fit(choice)
                task = tasks.create_task(self._fetch(start, choice))
                self._handoffs[start.key] = task
            else:
                self._submit(start.key, choice)
        except BatonError as error:
            self._refuse(start.key, error)

    async def _fetch(self, start: worker_pb2.Start, choice: Choice) -> None:
        """Prepare the choice's guide, then bring the KV here and decode, or bring what a peer holds of it and
        compute the rest."""
        sources = self._sources
        try:
            await self._state.guide(choice)
            if start.HasField("move_from"):
                reservation, read_blocks = await sources.mover.take(start, choice)
                report = worker_pb2.MoveReport(output_tokens=choice.output_len, read_blocks=read_blocks)
                self._send(worker_pb2.RequestOutput(key=start.key, moved=report))
                self._remember(start.key, choice)
                self._state.engine.adopt(reservation, choice)
                return
            if not start.prefill_address:
                if start.HasField("pull"):
                    await sources.puller.pull(choice, start.pull)
                self._submit(start.key, choice)
                return
            transfer = await sources.reader.read(start, choice, self._send)
            if transfer is not None:
                self._transfers[choice] = transfer
                self._remember(start.key, choice)
                sources.reader.adopt(choice)
        except BatonError as error:
            self._refuse(start.key, error)
        except Exception as error:
            log.exception("request %s: handoff failed unexpectedly", start.request_id)
            self._send(error_to(start.key, worker_pb2.RequestError.INTERNAL, repr(error)))
        finally:
            self._handoffs.pop(start.key, None)

    def _submit(self, key: int, choice: Choice) -> None:
        self._state.engine.submit(choice)
        self._remember(key, choice)

    def _remember(self, key: int, choice: Choice) -> None:
        self._keys[choice] = key
        self._choices[key] = choice

    def _forget(self, key: int) -> None:
        choice = self._choices.pop(key)
        self._keys.pop(choice, None)
        self._transfers.pop(choice, None)

    def _cancel(self, key: int) -> None:
        if task := self._handoffs.get(key):
            task.cancel()
        elif choice := self._choices.get(key):
            self._forget(key)
            self._state.engine.cancel(choice)

    def _refuse(self, key: int, error: BatonError) -> None:
        kind = next((k for cls, k in _ERRORS if isinstance(error, cls)), worker_pb2.RequestError.INTERNAL)
        self._send(error_to(key, kind, error.message))

    def _send(self, output: worker_pb2.RequestOutput) -> None:
        self._outbox.append(output)
        self._filled.set()
        if len(self._outbox) > _MAX_UNSENT and self._serving is not None:
            log.error("a router left %d outputs unread; its session ends", len(self._outbox))
            self._serving.cancel()

    async def _write(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send what has gathered, as one message each time the stream is ready for one."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            outputs, self._outbox = self._outbox, []
            load = load_to(self._state.engine.load(), self._state.layout.block_bytes)
            draining = not self._state.takes_decode
            await context.write(worker_pb2.StepOutputs(outputs=outputs, load=load, draining=draining))
            if self._ending and not self._outbox:
                raise _Over
