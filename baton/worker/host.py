"""One worker process from start to drain: model, pool, engine, services, membership."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from prometheus_client import REGISTRY

from baton.addresses import join
from baton.attention.base import Attention, KvCache
from baton.attention.select import block_bytes, create_attention, preferred_block_size
from baton.config import EngineSettings, Settings
from baton.device import device_of
from baton.engine.costs import Costs, peak_of
from baton.engine.curves import measure_decode, measure_prefill
from baton.engine.engine import Engine, Stop
from baton.engine.graphs import DecodeGraphs
from baton.engine.runner import Runner
from baton.engine.scheduler import Limits, Scheduler
from baton.engine.step_size import step_size
from baton.errors import BatonError, HandoffFailed
from baton.kv.events import Event, Stored, Tier
from baton.kv.lower import LowerTiers
from baton.kv.pool import BlockPool
from baton.machine import usable_cores
from baton.model_folder import model_folder
from baton.models.base import Model
from baton.models.loader import load_model
from baton.process import allow_open_files, serve_metrics, stop_on_signals
from baton.routing.pacing import Pace
from baton.routing.rates import notably_differ
from baton.routing.view import Curve, Role
from baton.rpc.kvstore_client import WorkerMembership
from baton.rpc.kvstore_messages import ROLE_NUMBERS
from baton.rpc.probes import answer_probes
from baton.rpc.registry_watch import Peer as KnownWorker
from baton.rpc.registry_watch import PeerListener, RegistryWatch
from baton.rpc.server import Server
from baton.rpc.v1 import kvstore_pb2, worker_pb2_grpc
from baton.tiers.disk import BlockFile
from baton.tiers.store import TierStore
from baton.transfer import create_transfer
from baton.transfer.spread import SpreadTransfer
from baton.transfer.wire import layout_to_proto
from baton.worker.admin import AdminService, drain, end_sessions
from baton.worker.convert import load_to
from baton.worker.devices import devices_of
from baton.worker.grammars import Grammars
from baton.worker.handoff_reader import HandoffReader
from baton.worker.handoff_server import KvService
from baton.worker.metrics import EngineCollector, RequestMetrics, WorkerFacts
from baton.worker.move import Mover
from baton.worker.peers import Peers
from baton.worker.pull import Puller
from baton.worker.role import RoleKeeper
from baton.worker.session import DecodeService
from baton.worker.sizing import pool_blocks
from baton.worker.startup import Startup
from baton.worker.state import Dispatch, ServedModel, WorkerState
from baton.worker.watchdog import end_when_stuck

log = logging.getLogger(__name__)

PREFILL_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64)
_LOAD_REPORT_S = 0.1
_WARM_UP_S = 10.0


@dataclass(frozen=True)
class Loaded:
    """What start-up builds before the first socket is opened."""

    model: Model
    attention: Attention
    scheduler: Scheduler
    runner: Runner
    prefill_curve: dict[int, float]
    decode_curve: dict[int, float]
    tiers: TierStore | None
    grammars: Grammars


def load(settings: Settings, startup: Startup) -> Loaded:
    """Load the model, allocate the pool and measure the step times. Takes seconds; blocks.

    Raises:
        UnsupportedModel: the model cannot be served.
        BatonError: the pool does not fit, or GPUs are missing.
    """
    chosen = settings.engine
    devices = devices_of(settings)
    device, on_gpu = devices[0], devices[0].type == "cuda"
    torch.set_num_threads(chosen.threads or usable_cores())
    folder = model_folder(settings.model.model)
    with startup.part("weights") as report:
        model = load_model(
            folder,
            str(device),
            settings.model.dtype,
            settings.model.max_model_len,
            report,
            len(devices),
        )
    specs = model.attention_specs
    block_size = chosen.block_size or preferred_block_size(device, model.dtype, specs, chosen.attention)
    longest_blocks = -(-model.config.max_model_len // block_size)
    blocks = pool_blocks(chosen, block_bytes(specs, model.dtype, block_size), longest_blocks, devices)
    attention = create_attention(model, blocks, block_size, chosen.attention)
    pool = BlockPool(blocks)
    graphs = None
    if on_gpu and chosen.cuda_graphs and len(devices) == 1:
        with startup.part("graphs") as report:
            most = chosen.max_batch_requests
            graphs = DecodeGraphs.record(model, attention, device_of(device), most, report)
    runner = Runner(model, attention, device, graphs)
    longest = min(chosen.max_batch_tokens or PREFILL_SIZES[-1], model.config.max_model_len - 1)
    prompts = [size for size in PREFILL_SIZES if size < longest] + [longest]
    batches = [size for size in DECODE_SIZES if size <= chosen.max_batch_requests]
    with startup.part("step times"):
        prefill = measure_prefill(runner, pool, block_size, prompts)
        decode = measure_decode(runner, pool, block_size, batches)
    tokens = chosen.max_batch_tokens or step_size(prefill, chosen.max_batch_requests)
    limits = Limits(tokens, chosen.max_batch_requests, chosen.max_waiting)
    pace = Pace(chosen.itl_target_s, _curve(prefill), _curve(decode))
    tiers = _add_tiers(chosen, pool, attention.caches)
    grammars = Grammars(folder / "tokenizer.json", model.config.vocab_size, model.config.eos_token_ids)
    return Loaded(model, attention, Scheduler(pool, limits, pace), runner, prefill, decode, tiers, grammars)


def _add_tiers(chosen: EngineSettings, pool: BlockPool, caches: Sequence[KvCache]) -> TierStore | None:
    """Put the tiers that the settings ask for below the pool, and measure how fast blocks come up.

    Raises:
        BatonError: the settings do not fit each other, or there is no room.
    """
    block_bytes = sum(cache.layout.block_bytes for cache in caches)
    host_slots, disk_slots = chosen.kv_host_bytes // block_bytes, chosen.kv_disk_bytes // block_bytes
    if bool(disk_slots) != bool(chosen.kv_disk_path):
        raise BatonError(
            f"--kv-disk-path and --kv-disk-bytes (at least {block_bytes}, one block) go together"
        )
    if disk_slots and not host_slots:
        raise BatonError("blocks reach the disk through host memory: --kv-disk-bytes needs --kv-host-bytes")
    if not host_slots:
        return None
    disk = BlockFile(Path(chosen.kv_disk_path), disk_slots, block_bytes) if disk_slots else None
    store = TierStore([cache.storage for cache in caches], host_slots, disk)
    blocks = pool.allocate(min(pool.total_blocks, disk_slots or host_slots))
    store.measure(blocks)
    pool.release(blocks)
    pool.put_below(LowerTiers(host_slots, disk_slots, store))
    return store


async def run_worker(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        BatonError: the worker could not start, or its engine died.
    """
    allow_open_files()
    stop = stop_on_signals()
    startup = Startup()
    loaded = await asyncio.to_thread(load, settings, startup)
    if stop.is_set():
        return
    async with AsyncExitStack() as stack:
        with startup.part("transfer and sockets"):
            worker = await Worker.assemble(settings, loaded, stop, stack)
        await worker.serve(stop, startup)
        if worker.failure is not None:
            raise BatonError(f"the engine died: {worker.failure!r}") from worker.failure


class Worker:
    """The assembled parts of one worker process."""

    def __init__(
        self,
        settings: Settings,
        state: WorkerState,
        membership: WorkerMembership,
        peers: Peers,
        description: kvstore_pb2.Worker,
        server: Server,
        tiers: TierStore | None,
    ) -> None:
        self.failure: BaseException | None = None
        self._settings = settings
        self._state = state
        self._membership = membership
        self._peers = peers
        self._description = description
        self._server = server
        self._tiers = tiers

    @classmethod
    async def assemble(
        cls, settings: Settings, loaded: Loaded, stop: asyncio.Event, stack: AsyncExitStack
    ) -> Worker:
        """Open sockets and register memory; `stack` closes everything."""
        incarnation = uuid.uuid4().hex[:12]
        chosen, model, attention = settings.worker, loaded.model, loaded.attention
        metrics_host = settings.observability.metrics_host or chosen.worker_host
        metrics_server, metrics_thread = serve_metrics(metrics_host, settings.observability.metrics_port)
        stack.callback(metrics_thread.join)
        stack.callback(metrics_server.shutdown)
        server = await stack.enter_async_context(Server())
        answer_probes(metrics_server, lambda: server.serving)
        port = server.bind(chosen.worker_host, chosen.worker_port, flag="--worker-port")
        worker_id = chosen.worker_id or f"{chosen.role}-{chosen.worker_host}-{port}"
        storages = [cache.storage for cache in attention.caches]
        create = partial(create_transfer, chosen.transfer)
        transfer = SpreadTransfer(create, storages, attention.layout, worker_id, incarnation)
        stack.callback(transfer.close)
        dispatch = Dispatch(asyncio.get_running_loop())
        total_blocks = attention.caches[0].total_blocks
        max_model_len = min(model.config.max_model_len, total_blocks * attention.layout.block_size)
        if loaded.tiers is not None:
            stack.callback(loaded.tiers.close)
        engine = Engine(
            loaded.scheduler,
            loaded.runner,
            dispatch,
            Stop(frozenset(model.config.eos_token_ids), max_model_len),
            loaded.tiers,
            overlap=_overlaps(settings),
        )
        stack.callback(engine.stop)
        stack.callback(loaded.grammars.close)
        model_name = settings.model.served_model_name or Path(settings.model.model).name
        state = WorkerState(
            worker_id=worker_id,
            incarnation=incarnation,
            role=Role(chosen.role),
            own_role=Role(chosen.role),
            model=ServedModel(
                model_name,
                model.config.vocab_size,
                max_model_len,
            ),
            layout=attention.layout,
            engine=engine,
            transfer=transfer,
            attention_backend=attention.name,
            metrics_address=join(metrics_host, metrics_server.server_port),
            metrics=RequestMetrics(model_name),
            grammars=loaded.grammars,
        )
        peers = Peers(worker_id, transfer, chosen.kv_verify)
        stack.push_async_callback(peers.close)

        async def snapshot() -> Sequence[Event]:
            return [Stored(ids, tier) for tier, ids in engine.held_ids().items() if ids]

        description = _describe(state, loaded, join(chosen.worker_host, port), settings.model.device)
        membership = WorkerMembership(settings.kvstore.kvstore, description, snapshot)
        worker = cls(settings, state, membership, peers, description, server, loaded.tiers)

        def died(error: BaseException) -> None:
            worker.failure = error
            stop.set()

        dispatch.connect(membership.publish, died)
        REGISTRY.register(_collector(state, model, total_blocks))
        reader = HandoffReader(state, peers, chosen.handoff_timeout_s)
        puller = Puller(state, peers, chosen.pull_timeout_s)
        decode = DecodeService(state, reader, puller, Mover(state, peers, chosen.handoff_timeout_s))
        server.add(worker_pb2_grpc.add_DecodeServicer_to_server, decode, "baton.v1.Decode")
        server.add(worker_pb2_grpc.add_KvServicer_to_server, KvService(state, puller), "baton.v1.Kv")
        roles = RoleKeeper(state, worker.announce, asyncio.get_running_loop().call_later)
        stack.callback(roles.close)
        admin = AdminService(state, peers, roles, worker.announce)
        server.add(worker_pb2_grpc.add_WorkerAdminServicer_to_server, admin, "baton.v1.WorkerAdmin")
        engine.start()
        await server.start()
        worker.announce()
        return worker

    def announce(self) -> None:
        """Tell the registry what changed in role, draining or the speed of tiers."""
        description = kvstore_pb2.Worker()
        description.CopyFrom(self._description)
        description.role = ROLE_NUMBERS[self._state.role]
        description.own_role = ROLE_NUMBERS[self._state.own_role]
        rates = self._tier_rates()
        description.host_bytes_per_s = rates.get(Tier.HOST, 0.0)
        description.disk_bytes_per_s = rates.get(Tier.DISK, 0.0)
        self._membership.change(worker=description, draining=self._state.draining)

    async def serve(self, stop: asyncio.Event, startup: Startup) -> None:
        """Stay in the cluster until `stop`, then drain and leave."""
        state, chosen = self._state, self._settings.worker
        kvstore = self._settings.kvstore
        async with asyncio.TaskGroup() as tasks:
            warm_up = _WarmUp(self._peers, state.worker_id, tasks)
            watch = RegistryWatch(kvstore.kvstore, ttl_s=kvstore.worker_ttl_s, listener=warm_up)
            stuck = end_when_stuck(state.engine.tally, self._server, self._settings.engine.step_timeout_s)
            jobs = (watch.run(), self._report(), stuck)
            background = [tasks.create_task(job) for job in jobs]
            await warm_up.done(watch)
            background.append(tasks.create_task(self._membership.run()))
            await self._server.set_serving(True)
            log.info(
                "ready: %s serves %s on %s, %d KV blocks of %d tokens, metrics on %s, attention %s, %s",
                state.worker_id,
                state.model.name,
                self._description.address,
                state.engine.load().total_blocks,
                state.layout.block_size,
                state.metrics_address,
                state.attention_backend,
                state.transfer.describe().transport,
            )
            log.info("started in %s", startup.summary())
            await stop.wait()
            if self.failure is None:
                unfinished = await drain(state, self.announce, chosen.drain_timeout_s)
                log.info("drained; %d requests unfinished", unfinished)
                await end_sessions(state)
            for task in background:
                task.cancel()

    def _tier_rates(self) -> dict[Tier, float]:
        return {} if self._tiers is None else self._tiers.read_rates()

    async def _report(self) -> None:
        """Keep the registry current with the load and the speed of reads."""
        engine = self._state.engine
        last = None
        rates: dict[str, float] = {}
        tier_rates = self._tier_rates()
        while True:
            if notably_differ(tier_rates, now_rates := self._tier_rates()):
                self.announce()
                tier_rates = now_rates
            if (measured := self._peers.read_rates()) != rates:
                self._membership.report_reads(measured)
                rates = measured
            now = engine.load()
            if now != last:
                self._membership.report(load_to(now, self._state.layout.block_bytes))
                last = now
            await asyncio.sleep(_LOAD_REPORT_S)


class _WarmUp(PeerListener):
    """Connects to every other worker before the first request needs it: any may hold a wanted prefix."""

    def __init__(self, peers: Peers, own_id: str, tasks: asyncio.TaskGroup) -> None:
        self._peers = peers
        self._own_id = own_id
        self._tasks = tasks
        self._connecting: set[asyncio.Task[None]] = set()

    async def done(self, watch: RegistryWatch) -> None:
        """Wait until the workers that were there first can be read from, but no longer than is of use: a
        kvstore or a worker may be away."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_WARM_UP_S):
                await watch.ready()
                await asyncio.gather(*map(asyncio.shield, self._connecting))

    def worker_added(self, peer: KnownWorker) -> None:
        if peer.view.worker_id != self._own_id:
            task = self._tasks.create_task(self._connect(peer))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def worker_gone(self, peer: KnownWorker) -> None:
        self._tasks.create_task(self._peers.forget(peer.view.address, peer.view.incarnation))

    async def _connect(self, peer: KnownWorker) -> None:
        try:
            await self._peers.get(peer.view.address, peer.view.incarnation)
        except HandoffFailed as error:
            log.warning("cannot read KV from %s yet: %s", peer.view.worker_id, error.message)


def _describe(state: WorkerState, loaded: Loaded, address: str, device: str) -> kvstore_pb2.Worker:
    """What the registry tells others of this worker."""
    return kvstore_pb2.Worker(
        worker_id=state.worker_id,
        incarnation=state.incarnation,
        address=address,
        role=ROLE_NUMBERS[state.role],
        model=state.model.name,
        layout=layout_to_proto(state.layout),
        max_model_len=state.model.max_model_len,
        total_blocks=state.engine.load().total_blocks,
        device=device,
        prefill_curve=_points(loaded.prefill_curve),
        decode_curve=_points(loaded.decode_curve),
        itl_target_s=loaded.scheduler.pace.itl_target_s,
        tensor_parallel=len(loaded.model.shards),
    )


def _collector(state: WorkerState, model: Model, total_blocks: int) -> EngineCollector:
    on_gpu = model.device.type == "cuda"
    layout = state.layout
    facts = WorkerFacts(
        worker_id=state.worker_id,
        model=state.model.name,
        device=torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        dtype=layout.dtype,
        transport=state.transfer.describe().transport,
        attention=state.attention_backend,
        block_size=layout.block_size,
        total_blocks=total_blocks,
        tensor_parallel=len(model.shards),
    )
    costs = Costs.of(model.config, model.dtype.itemsize, layout.block_bytes // layout.block_size)
    return EngineCollector(state.engine, facts, costs, peak_of(facts.device, facts.tensor_parallel))


def _overlaps(settings: Settings) -> bool:
    if settings.engine.overlap == "auto":
        return settings.model.device == "cuda"
    return settings.engine.overlap == "on"


def _curve(measured: dict[int, float]) -> Curve:
    return Curve.measured(measured.items())


def _points(curve: dict[int, float]) -> list[kvstore_pb2.CurvePoint]:
    return [kvstore_pb2.CurvePoint(size=size, seconds=seconds) for size, seconds in sorted(curve.items())]
