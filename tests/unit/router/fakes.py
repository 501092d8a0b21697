"""A decode worker that says what a test tells it to, over real gRPC, and a cluster that consists of such."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import grpc

from baton.config import KvstoreSettings, ModelSettings, RouterSettings, Settings
from baton.kv.hashing import KvLayout
from baton.kv.index import PrefixIndex
from baton.routing import Role, WorkerView
from baton.rpc.server import Server
from baton.rpc.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from services.router.cluster import KnownWorker
from services.router.router import Router

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "baton-small"
LAYOUT = KvLayout("fingerprint", "float32", 16, 16 * 1024, "test")
EOS = 1
MOVED = worker_pb2.RequestError(kind=worker_pb2.RequestError.MOVED, message="moved")


class FakeWorker(worker_pb2_grpc.DecodeServicer):
    """Answers every request with the tokens of `script`, from where its output so far ends.

    After `hold_at` tokens it waits for `go_on`. The next errors of `errors` are answered instead,
    one per Start. `break_at` ends the whole session after so many tokens, `breaks` times. After `drain` it
    gives its requests to fakes that ask for them; with `give_ahead` those go on after so many tokens more,
    which this one never sends, and its session breaks.
    """

    at: ClassVar[dict[str, FakeWorker]] = {}

    def __init__(self, worker_id: str, script: list[int]) -> None:
        self.worker_id = worker_id
        self.script = script
        self.errors: list[worker_pb2.RequestError] = []
        self.hold_at: int | None = None
        self.go_on = asyncio.Event()
        self.break_at: int | None = None
        self.breaks = 1
        self.draining = False
        self.give_ahead: int | None = None
        self.taken: dict[int, asyncio.Future[int]] = {}
        self.outboxes: set[asyncio.Queue[worker_pb2.RequestOutput | None]] = set()
        self.starts: list[worker_pb2.Start] = []
        self.cancelled: set[int] = set()
        self.running: dict[int, asyncio.Task[None]] = {}
        self.changed = asyncio.Condition()
        self.address = ""
        self.sessions = 0

    async def wait_for(self, condition: str) -> None:
        """Until the expression over `self` holds; a minute at most."""
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(lambda: eval(condition, {"self": self, "len": len}))

    def drain(self) -> None:
        self.draining = True
        for outbox in self.outboxes:
            outbox.put_nowait(None)

    async def give(self, key: int) -> int:
        """Stop a request; how many tokens it has."""
        self.taken[key] = asyncio.get_running_loop().create_future()
        self.go_on.set()
        return await self.taken[key]

    async def _note(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def Session(
        self, requests: AsyncIterator[worker_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> None:
        self.sessions += 1
        outputs: asyncio.Queue[worker_pb2.RequestOutput | None] = asyncio.Queue()
        self.outboxes.add(outputs)
        broken = asyncio.Event()

        async def write(output: worker_pb2.RequestOutput) -> None:
            outputs.put_nowait(output)
            await outputs.join()

        async def write_all() -> None:
            """A task of its own: a write cancelled half-way, with its request, would end the session."""
            load = worker_pb2.WorkerLoad(total_blocks=4096, free_blocks=4000)
            while True:
                output = await outputs.get()
                said = [output] if output is not None else []
                await context.write(worker_pb2.StepOutputs(outputs=said, load=load, draining=self.draining))
                outputs.task_done()

        async def read(tasks: asyncio.TaskGroup) -> None:
            async for message in requests:
                for start in message.starts:
                    self.starts.append(start)
                    task = tasks.create_task(self._generate(start, write, broken))
                    self.running[start.key] = task
                for key in message.cancelled_keys:
                    self.cancelled.add(key)
                    if running := self.running.get(key):
                        running.cancel()
                await self._note()

        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(read(tasks))
                breaking = tasks.create_task(broken.wait())
                writing = tasks.create_task(write_all())
                await asyncio.wait([reading, breaking], return_when=asyncio.FIRST_COMPLETED)
                for task in (reading, breaking, writing, *self.running.values()):
                    task.cancel()
        finally:
            self.outboxes.discard(outputs)
            self.sessions -= 1
            await self._note()
        if broken.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker broke the session")

    async def _generate(self, start: worker_pb2.Start, write, broken: asyncio.Event) -> None:
        try:
            if self.errors:
                await write(worker_pb2.RequestOutput(key=start.key, error=self.errors.pop(0)))
                return
            await self._answer(start, write, broken)
        finally:
            self.running.pop(start.key, None)
            await asyncio.shield(self._note())

    async def _answer(self, start: worker_pb2.Start, write, broken: asyncio.Event) -> None:
        sampling, first = start.sampling, len(start.output_token_ids)
        if start.HasField("move_from"):
            first = await FakeWorker.at[start.move_from.address].give(start.move_from.key)
            moved = worker_pb2.MoveReport(output_tokens=first, read_blocks=1)
            await write(worker_pb2.RequestOutput(key=start.key, moved=moved))
        for at in range(first, sampling.max_tokens):
            if at == self.hold_at:
                await self.go_on.wait()
            if taken := self.taken.get(start.key):
                taken.set_result(at + (self.give_ahead or 0))
                if self.give_ahead is not None:
                    broken.set()
                    await asyncio.Event().wait()
                await write(worker_pb2.RequestOutput(key=start.key, error=MOVED))
                return
            if at == self.break_at and self.breaks:
                self.breaks -= 1
                broken.set()
                await asyncio.Event().wait()
            token = self.script[at] if at < len(self.script) else EOS
            output = worker_pb2.RequestOutput(key=start.key, token_ids=[token])
            if sampling.HasField("logprobs"):
                output.logprobs.append(logprobs(token, sampling.logprobs))
            if at == len(start.output_token_ids):
                output.prefill.kind = (
                    worker_pb2.PrefillReport.REMOTE
                    if start.prefill_address
                    else worker_pb2.PrefillReport.LOCAL
                )
                output.prefill.cached_tokens = 3
                if sampling.HasField("prompt_logprobs") and at == 0:
                    output.prompt_logprobs.extend(
                        logprobs(prompt_token, sampling.prompt_logprobs)
                        for prompt_token in start.prompt_token_ids[1:]
                    )
            if token in sampling.stop_token_ids and at >= sampling.min_tokens:
                output.stop_token_id, output.stopped_by_token_id = token, True
                output.finish_reason = inference_pb2.FINISH_REASON_STOP
            elif token == EOS and not sampling.ignore_eos:
                output.finish_reason = inference_pb2.FINISH_REASON_STOP
            elif at + 1 == sampling.max_tokens:
                output.finish_reason = inference_pb2.FINISH_REASON_LENGTH
            await write(output)
            if output.finish_reason:
                return


def logprobs(token: int, top: int) -> inference_pb2.PositionLogprobs:
    return inference_pb2.PositionLogprobs(
        chosen=inference_pb2.TokenLogprob(token_id=token, logprob=-0.5, rank=1),
        top=[
            inference_pb2.TokenLogprob(token_id=token + rank - 1, logprob=-0.5 * rank, rank=rank)
            for rank in range(1, top + 1)
        ],
    )


@dataclass
class FakeReservations:
    """What other routers have promised, as a test says; `mine` is what was published."""

    theirs: dict[str, tuple[int, int, int]]
    mine: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def publish(self, totals: Mapping[str, tuple[int, int, int]]) -> None:
        self.mine = totals

    def others(self) -> Mapping[str, tuple[int, int, int]]:
        return self.theirs


@dataclass(frozen=True)
class FakeCluster:
    """A registry that never changes by itself."""

    workers: Mapping[str, KnownWorker]
    index: PrefixIndex
    reservations: FakeReservations = field(default_factory=lambda: FakeReservations({}))
    connected: bool = True

    async def run(self) -> None:
        await asyncio.Event().wait()


def known(worker_id: str, address: str, role: Role = Role.HYBRID, total_blocks: int = 4096) -> KnownWorker:
    view = WorkerView(worker_id, "one", address, role, total_blocks, total_blocks)
    return KnownWorker(view, LAYOUT, 16384)


@asynccontextmanager
async def running_worker(worker: FakeWorker) -> AsyncIterator[FakeWorker]:
    async with Server() as server:
        server.add(worker_pb2_grpc.add_DecodeServicer_to_server, worker, "baton.v1.Decode")
        worker.address = f"127.0.0.1:{server.bind('127.0.0.1', 0, flag='--worker-port')}"
        FakeWorker.at[worker.address] = worker
        await server.start()
        yield worker


@dataclass(frozen=True)
class RunningRouter:
    router: Router
    cluster: FakeCluster

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.router.http_port}"

    @property
    def own_url(self) -> str:
        """Of the port with the metrics."""
        return f"http://127.0.0.1:{self.router.metrics_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.router.grpc_port}"


@asynccontextmanager
async def running_router(
    *workers: FakeWorker | KnownWorker, model: Path = MODEL, **changes: object
) -> AsyncIterator[RunningRouter]:
    """A router in front of `workers`, ready; stopped at the end. `changes` are router settings."""
    entries = [known(w.worker_id, w.address) if isinstance(w, FakeWorker) else w for w in workers]
    cluster = FakeCluster({entry.view.worker_id: entry for entry in entries}, PrefixIndex())
    settings = Settings(
        model=ModelSettings(model=str(model)),
        router=replace(
            RouterSettings(port=0, grpc_port=0, policy="round-robin", stop_grace_s=1.0), **changes
        ),
        kvstore=KvstoreSettings(),
    )
    router = Router(settings, cluster)
    router.on_workers()
    stop, listening = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(router.run(stop, listening))
        try:
            async with asyncio.timeout(60):
                await listening.wait()
                for worker_id, entry in cluster.workers.items():
                    while entry.view.role.decodes and router.sessions.connected(worker_id) is None:
                        await asyncio.sleep(0.01)
            yield RunningRouter(router, cluster)
        finally:
            stop.set()
            await running
