"""Decode.Session: one router's stream of requests and the step outputs that answer them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.engine.interfaces import Output
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import Work
from baton.errors import BatonError, HandoffFailed, InvalidRequest, Overloaded
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from baton.worker.convert import error_to, load_to, output_to
from baton.worker.handoff_reader import HandoffReader
from baton.worker.metrics import PREFILLS
from baton.worker.pull import Puller
from baton.worker.state import WorkerState
from baton.worker.traces import trace_decode, trace_prefill

log = logging.getLogger(__name__)

# Outputs a router may leave unread; a live one reads them within a step or two.
_MAX_UNSENT = 65_536

_ERRORS: tuple[tuple[type[BatonError], worker_pb2.RequestError.Kind.ValueType], ...] = (
    (InvalidRequest, worker_pb2.RequestError.INVALID),
    (Overloaded, worker_pb2.RequestError.OVERLOADED),
    (HandoffFailed, worker_pb2.RequestError.HANDOFF_FAILED),
)


class DecodeService(worker_pb2_grpc.DecodeServicer):
    """Serves sessions; each ends with its stream and takes its requests with it."""

    def __init__(self, state: WorkerState, reader: HandoffReader, puller: Puller) -> None:
        self._state = state
        self._reader = reader
        self._puller = puller

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        session = Session(self._state, self._reader, self._puller)
        self._state.sessions += 1
        try:
            await session.serve(request_iterator, context)
        finally:
            self._state.sessions -= 1
            session.cancel_all()


class Session:
    """The requests of one router on this worker. Owns their choices and handoff tasks."""

    def __init__(self, state: WorkerState, reader: HandoffReader, puller: Puller) -> None:
        self._state = state
        self._reader = reader
        self._puller = puller
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
        """Take messages until the router ends the stream."""
        self._serving = asyncio.current_task()
        async with asyncio.TaskGroup() as tasks:
            writer = tasks.create_task(self._write(context))
            try:
                async for message in requests:
                    if message.HasField("hello"):
                        log.info("session with router %s", message.hello.router_id)
                    for start in message.starts:
                        self._start(start, tasks)
                    for key in message.cancelled_keys:
                        self._cancel(key)
            finally:
                writer.cancel()
                for task in self._handoffs.values():
                    task.cancel()

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
            if self._state.draining:
                self._send(error_to(start.key, worker_pb2.RequestError.DRAINING, "the worker is draining"))
                return
            if not self._state.role.decodes:
                raise HandoffFailed(
                    f"worker {self._state.worker_id} has role prefill and takes no decode work"
                )
            choice = self._state.choice(start, self, Work.GENERATE)
            if start.prefill_address or start.HasField("pull"):
                self._state.engine.scheduler.require_fit(choice)
                task = tasks.create_task(self._fetch(start, choice))
                self._handoffs[start.key] = task
            else:
                self._submit(start.key, choice)
        except BatonError as error:
            self._refuse(start.key, error)

    async def _fetch(self, start: worker_pb2.Start, choice: Choice) -> None:
        """Bring the prompt's KV here and decode, or bring what a peer holds of it and compute the rest."""
        try:
            if not start.prefill_address:
                await self._puller.pull(choice, start.pull)
                self._submit(start.key, choice)
                return
            transfer = await self._reader.read(start, choice, self._send)
            if transfer is not None:
                self._transfers[choice] = transfer
                self._remember(start.key, choice)
                self._reader.adopt(choice)
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
            await context.write(worker_pb2.StepOutputs(outputs=outputs, load=load))
