"""The router's one stream to each decode worker, and the requests that share it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable

import grpc

from baton.routing.view import WorkerView
from baton.rpc.channels import open_channel
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from services.router.outbox import Outbox
from services.router.poison import Loss

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_WRITE_TIMEOUT_S = 15.0
_FIRST_RETRY_S = 0.05
_LAST_RETRY_S = 2.0
# A registry that was cut off forgets workers that are well; they join it again within a beat or two.
_DOUBT_S = 2.0
# Steps a client may lag behind its worker before its request is given up.
_MAX_UNREAD_STEPS = 8192


class SessionBroken(Exception):
    """The stream to the worker ended before the request did; `loss` is what ran there, unless
    the worker was to leave anyway, or the request did not run yet."""

    def __init__(self, message: str, loss: Loss | None = None) -> None:
        super().__init__(message)
        self.loss = loss


class ClientTooSlow(Exception):
    """The client reads so much slower than the worker writes that the router would have to hoard."""


class _SessionEnded(Exception):
    """The worker ended the stream."""


class Attempt:
    """One request on one session, until `close`."""

    def __init__(self, session: Session, key: int, prompt: int) -> None:
        self.prompt = prompt
        self._session = session
        self._key = key
        self._roused = session.draining
        self._unread: list[worker_pb2.RequestOutput] = []
        self._failure: Exception | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def draining(self) -> bool:
        """Whether the worker gives up what it decodes."""
        return self._session.draining

    @property
    def place(self) -> worker_pb2.MoveFrom:
        """Where another worker finds the request."""
        worker = self._session.worker
        return worker_pb2.MoveFrom(
            address=worker.address,
            incarnation=worker.incarnation,
            router_id=self._session.router_id,
            key=self._key,
        )

    def close(self) -> None:
        """Read no more; cancels the work there, if it has not ended."""
        self._session.forget(self._key, cancel=not self._ended)

    async def outputs(self) -> list[worker_pb2.RequestOutput]:
        """What has come since the last call, oldest first; waits for something, or for the worker to drain:
        then it may be nothing, once.

        Raises:
            SessionBroken: the rest will not come.
            ClientTooSlow: more came than this side may fall behind.
        """
        while not self._unread and not self._roused:
            await self._wait()
        self._roused = False
        unread, self._unread = self._unread, []
        return unread

    async def first(self) -> worker_pb2.RequestOutput:
        """The next output, which stays to be read; waits for it. Raises as `outputs` does."""
        while not self._unread:
            await self._wait()
        return self._unread[0]

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def rouse(self) -> None:
        """Let who waits for outputs see that the worker drains."""
        self._roused = True
        self._wake()

    def deliver(self, output: worker_pb2.RequestOutput) -> None:
        if output.finish_reason or output.HasField("error"):
            self._ended = True
        if len(self._unread) >= _MAX_UNREAD_STEPS:
            self._unread.clear()
            self.fail(ClientTooSlow(f"{_MAX_UNREAD_STEPS} steps behind its worker"))
            return
        self._unread.append(output)
        self._wake()

    def fail(self, failure: Exception) -> None:
        if not self._ended and self._failure is None:
            self._failure = failure
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Session:
    """One incarnation of one worker. `run` keeps the stream up until cancelled."""

    def __init__(
        self,
        worker: WorkerView,
        router_id: str,
        on_load: Callable[[str, worker_pb2.WorkerLoad], None],
        on_change: Callable[[], None],
        draining: set[str],
    ) -> None:
        self.worker = worker
        self.router_id = router_id
        self._draining = draining
        self._on_load = on_load
        self._on_change = on_change
        self._attempts: dict[int, Attempt] = {}
        self._last_key = 0
        self._others = 0  # requests there that other routers brought
        self._heard_s = 0.0
        self._gone_s: float | None = None
        self._outbox: Outbox | None = None
        self._overflowed = False

    @property
    def connected(self) -> bool:
        return self._outbox is not None

    @property
    def draining(self) -> bool:
        return self.worker.worker_id in self._draining

    @property
    def idle(self) -> bool:
        return not self._attempts

    def doubted(self, in_registry: bool) -> bool:
        """Whether the worker has been gone from the registry for a while, and silent here as well: it is
        given up then, for keepalive takes longer to find that out."""
        now_s = asyncio.get_running_loop().time()
        if in_registry:
            self._gone_s = None
            return False
        if self._gone_s is None:
            self._gone_s = now_s
        return now_s - max(self._gone_s, self._heard_s) > _DOUBT_S

    def start(self, start: worker_pb2.Start, prompt: int) -> Attempt:
        """Send `start`, whose key is set here; `prompt` names it in a `Loss`.

        Raises:
            SessionBroken: the worker cannot be reached now.
        """
        if self._outbox is None:
            raise SessionBroken(f"no session with {self.worker.worker_id}")
        if self._outbox.full:
            raise SessionBroken(f"{self.worker.worker_id} does not read its session")
        self._last_key += 1
        start.key = self._last_key
        self._outbox.start(start)
        attempt = self._attempts[start.key] = Attempt(self, start.key, prompt)
        return attempt

    def forget(self, key: int, *, cancel: bool) -> None:
        """The request is over on this side; with `cancel`, tell the worker."""
        if self._attempts.pop(key, None) is None or not cancel or self._outbox is None:
            return
        if self._outbox.full:
            # The cancel is lost, so the stream must go: with it the worker frees everything.
            self._overflowed = True
        else:
            self._outbox.cancel(key)

    async def run(self) -> None:
        """Connect, and connect again after every failure, with growing pauses."""
        pause_s = _FIRST_RETRY_S
        loop = asyncio.get_running_loop()
        async with open_channel(self.worker.address) as channel:
            stub = worker_pb2_grpc.DecodeStub(channel)
            while True:
                began = loop.time()
                try:
                    await self._serve(channel, stub)
                except* (
                    grpc.aio.AioRpcError,
                    asyncio.InvalidStateError,
                    TimeoutError,
                    _SessionEnded,
                ) as group:
                    log.debug("no session with %s: %s", self.worker.worker_id, _reason(group))
                if loop.time() - began > _LAST_RETRY_S:
                    pause_s = _FIRST_RETRY_S
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _LAST_RETRY_S)

    async def _serve(self, channel: grpc.aio.Channel, stub: worker_pb2_grpc.DecodeStub) -> None:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await channel.channel_ready()
        call = stub.Session()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await call.write(worker_pb2.SessionRequest(hello=worker_pb2.Hello(router_id=self.router_id)))
            self._outbox = Outbox()
            self._overflowed = False
            log.info("session with %s at %s is up", self.worker.worker_id, self.worker.address)
            self._on_change()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(call, self._outbox))
                tasks.create_task(self._read(call))
        except BaseException as error:
            self._break(error)
            raise
        finally:
            call.cancel()

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.StepOutputs],
        outbox: Outbox,
    ) -> None:
        while not self._overflowed:
            message = await outbox.take()
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await call.write(message)
        raise _SessionEnded("the worker reads too slowly")

    async def _read(
        self, call: grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.StepOutputs]
    ) -> None:
        attempts = self._attempts
        worker_id = self.worker.worker_id
        clock = asyncio.get_running_loop().time
        while isinstance(step := await call.read(), worker_pb2.StepOutputs):
            self._heard_s = clock()
            if step.HasField("load"):
                self._on_load(worker_id, step.load)
                self._others = max(0, step.load.running + step.load.waiting - len(attempts))
            if step.draining != self.draining:
                self._drains(step.draining)
            for output in step.outputs:
                attempt = attempts.get(output.key)
                if attempt is not None:
                    attempt.deliver(output)
        raise _SessionEnded("the worker ended the stream")

    def _drains(self, draining: bool) -> None:
        worker_id = self.worker.worker_id
        if draining:
            log.info("%s gives up what it decodes", worker_id)
            self._draining.add(worker_id)
            for attempt in self._attempts.values():
                attempt.rouse()
        else:
            self._draining.discard(worker_id)
        self._on_change()

    def _break(self, error: BaseException) -> None:
        """The stream is over: every request on it fails over."""
        if self._outbox is None:
            return
        self._outbox = None
        left, reason = self.draining, _reason(error)
        self._draining.discard(self.worker.worker_id)
        if not isinstance(error, asyncio.CancelledError):
            level = logging.WARNING if self._attempts else logging.INFO
            log.log(level, "session with %s broke: %s", self.worker.worker_id, reason)
        attempts = list(self._attempts.values())
        self._attempts.clear()
        loss = Loss(
            self.worker.worker_id,
            self.worker.incarnation,
            frozenset(attempt.prompt for attempt in attempts),
            alone=self._others == 0,
        )
        broken = f"session with {self.worker.worker_id} broke: {reason}"
        for attempt in attempts:
            attempt.fail(SessionBroken(broken, None if left else loss))
        self._on_change()


class SessionPool:
    """A session with every worker the registry names. `run` owns their tasks.

    `draining` are the workers that have said on their session that they give up what they decode.
    """

    def __init__(
        self,
        router_id: str,
        on_load: Callable[[str, worker_pb2.WorkerLoad], None],
        on_change: Callable[[], None],
    ) -> None:
        self.draining: set[str] = set()
        self._router_id = router_id
        self._on_load = on_load
        self._on_change = on_change
        self._sessions: dict[str, Session] = {}
        self._tasks: dict[Session, asyncio.Task[None]] = {}
        self._wanted: dict[str, WorkerView] = {}
        self._changed = asyncio.Event()

    def connected(self, worker_id: str) -> Session | None:
        """The worker's session, if requests can be started on it now."""
        session = self._sessions.get(worker_id)
        return session if session is not None and session.connected else None

    def sync(self, workers: Iterable[WorkerView]) -> None:
        """Hold sessions with these workers from now on."""
        self._wanted = {worker.worker_id: worker for worker in workers}
        self._changed.set()

    async def run(self) -> None:
        """Open and close sessions as `sync` says, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                self._close_unwanted()
                for worker_id, worker in self._wanted.items():
                    if worker_id not in self._sessions and worker.role.decodes:
                        session = Session(
                            worker, self._router_id, self._on_load, self._on_change, self.draining
                        )
                        self._sessions[worker_id] = session
                        self._tasks[session] = tasks.create_task(session.run())
                # Sessions of workers that left the registry end when their last request does.
                timeout_s = 1.0 if self._sessions.keys() - self._wanted.keys() else None
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._changed.wait()
                except TimeoutError:
                    continue

    def _close_unwanted(self) -> None:
        for worker_id, session in list(self._sessions.items()):
            wanted = self._wanted.get(worker_id)
            doubted = session.doubted(in_registry=wanted is not None)
            if wanted is None:
                # The registry may be wrong about a worker that still answers.
                keep = session.connected and not session.idle and not doubted
            else:
                keep = (wanted.incarnation, wanted.address) == (
                    session.worker.incarnation,
                    session.worker.address,
                )
            if not keep:
                del self._sessions[worker_id]
                self._tasks.pop(session).cancel()


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, asyncio.CancelledError):
        return "the router closed it"
    return str(error) or "no answer in time"
