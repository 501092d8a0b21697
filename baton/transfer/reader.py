"""Who drives our reads: one thread that owns the reading agent and polls it while reads are running.

Why an agent of its own: UCX cannot take back a get. Released, cancelled or disconnected, its bytes still
arrive whenever the peer sends them (measured: hundreds of MB after release and disconnect). Only destroying
the agent stops them, so reads have one that can be destroyed without touching those who read from us.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from baton.errors import HandoffFailed
from baton.transfer.agent import Agent, Handle
from baton.transfer.base import (
    DRAIN_S,
    WARM_UP_BYTES,
    Pool,
    PoolDescription,
    ReadReport,
    Side,
    TransferUnavailable,
    side_of,
)
from baton.transfer.chunks import Chunk

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Plan = Callable[[PoolDescription], list[Chunk]]
"""What to read from a peer; may raise HandoffFailed or ValueError."""

CHUNKS_IN_FLIGHT = 2
"""Per read: the next chunk is asked for before the last one is complete."""

AT_ONCE_BYTES = 4 * 1024 * 1024
"""Reads up to this are begun on the caller's thread when nothing else is going on. Over shared memory that
copies them, and spares waking a thread and being woken by it, 0.2 ms. The loop waits for the copy meanwhile,
half a millisecond at most, so larger ones are not."""

SPIN_S = 100e-6
NAP_S = 50e-6
LONG_NAP_S = 250e-6
LONG_NAP_AFTER_S = 5e-3
"""Waiting on a read polls without a pause first, then every NAP_S, then every LONG_NAP_S: a small read over
TCP takes 0.1 ms, and a large one is as fast with pauses as without (see benchmarks/transfer.py)."""


@dataclass
class _Peer:
    description: PoolDescription
    connected: bool = False
    broken: bool = False  # the connection failed or must go: disconnect once nothing uses it
    connections: int = 0  # made so far, or tried: the number of the current one


@dataclass(eq=False)
class _Read:
    peer: _Peer
    chunks: deque[Chunk]
    started: float
    deadline: float
    done: asyncio.Future[ReadReport]
    moved: int = 0
    in_flight: dict[Handle, Chunk] = field(default_factory=dict)
    failure: Exception | None = None
    give_up_at: float = 0.0
    broke_on: int | None = None  # the number of the connection that broke under it

    @property
    def source(self) -> str:
        return self.peer.description.agent_name

    def fail(self, failure: Exception) -> None:
        """Ask for no more; what is in flight is waited for until `give_up_at`."""
        if self.failure is None:
            self.failure = failure
            self.give_up_at = time.monotonic() + DRAIN_S
            self.chunks.clear()


class Reader:
    """Runs reads on its own thread; its coroutines only wait for it."""

    def __init__(self, name: str, pool: Pool) -> None:
        self._name = name
        self._pool = pool
        # Warm-up reads land here: registered like the pool, and nobody's block.
        self.scratch_blocks = max(1, WARM_UP_BYTES // pool.layout.block_bytes)
        self._scratch = torch.empty(
            self.scratch_blocks * pool.layout.block_bytes, dtype=torch.uint8, device=pool.storage.device
        )
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Held by whoever uses what follows: the thread while it works, the loop while it begins a read.
        self._turn = threading.Lock()
        self._agent: Agent | None = None
        self._generation = 0
        self._peers: dict[str, _Peer] = {}
        self._retired: list[_Peer] = []  # removed, and connected until nothing uses them
        self._reads: list[_Read] = []
        self._last_event = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-reader", daemon=True)
        self._thread.start()

    @property
    def scratch(self) -> Side:
        """Where warm-up reads land: room for `scratch_blocks` blocks."""
        return side_of(self._scratch)

    # ---- called from the loop

    async def add_peer(self, description: PoolDescription) -> None:
        """See `Transfer.add_peer`."""
        await self._ask(lambda: self._add_peer(description))

    async def remove_peer(self, agent_name: str) -> None:
        """See `Transfer.remove_peer`."""
        await self._ask(lambda: self._remove_peer(agent_name))

    async def read(self, agent_name: str, plan: Plan, timeout_s: float, size_bytes: int) -> ReadReport:
        """Copy the chunks that `plan` makes for the peer, `size_bytes` in all; ends as `Transfer.read`."""
        done: asyncio.Future[ReadReport] = asyncio.get_running_loop().create_future()
        started = time.monotonic()
        begin = partial(self._begin, agent_name, plan, started, started + timeout_s, done)
        if size_bytes > AT_ONCE_BYTES or not self._begin_here(agent_name, begin):
            self._command(begin)
        return await _settled(done, on_cancel=lambda: self._commands.put(lambda: self._cancel(done)))

    def close(self) -> None:
        """Fail what runs, destroy the agent and end the thread."""
        self._command(self._stop)
        self._closing = True
        self._thread.join()

    def _begin_here(self, agent_name: str, begin: Callable[[], None]) -> bool:
        """Begin a read without the thread, unless that is at work, or connecting would take time."""
        if self._pool.storage.is_cuda or self._closing or not self._turn.acquire(blocking=False):
            return False
        try:
            peer = self._peers.get(agent_name)
            ready = peer is not None and peer.connected and not peer.broken
            if not ready or self._reads or not self._commands.empty():
                return False
            try:
                begin()
            except Exception as error:
                self._commands.put(partial(_raise, error))
            if self._reads:  # the bytes are on their way: the thread, asleep so far, waits for them
                self._commands.put(lambda: None)
            return True
        finally:
            self._turn.release()

    def _command(self, command: Callable[[], None]) -> None:
        if self._closing:
            raise HandoffFailed("this worker is stopping")
        self._commands.put(command)

    async def _ask(self, work: Callable[[], None]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                work()
            except Exception as error:
                _deliver(done, error)
            else:
                _deliver(done, None)

        self._command(run)
        await _settled(done, on_cancel=lambda: None)

    # ---- on the thread

    def _run(self) -> None:
        if self._pool.storage.is_cuda:
            torch.cuda.set_device(self._pool.storage.device)  # UCX's CUDA transports use the thread's context
        while not self._closing or self._reads or not self._commands.empty():
            try:
                self._step()
            except Exception:
                logger.exception("the KV reader failed; its connections start over")
                with self._turn:
                    for read in self._reads:
                        read.fail(HandoffFailed("the KV reader of this worker failed; see its log"))
                    self._destroy_agent()
        with self._turn:
            self._destroy_agent()

    def _step(self) -> None:
        try:
            work = self._commands.get(timeout=self._pause())  # first: a cancel does not wait behind a poll
        except Empty:
            work = self._advance_all
        with self._turn:
            work()

    def _advance_all(self) -> None:
        for read in list(self._reads):
            self._advance(read)
        self._disconnect_broken()
        now = time.monotonic()
        late = [read.source for read in self._reads if read.failure and now > read.give_up_at]
        if late:
            logger.warning(
                "%s did not deliver within %.0f s after its read was given up; connections start over",
                ", ".join(sorted(set(late))),
                DRAIN_S,
            )
            self._destroy_agent()

    def _pause(self) -> float | None:
        """Seconds until the running reads should be looked at; None when there are none."""
        if not self._reads:
            return None
        waited = time.monotonic() - self._last_event
        if waited < SPIN_S:
            return 0.0
        return NAP_S if waited < LONG_NAP_AFTER_S else LONG_NAP_S

    def _begin(
        self,
        agent_name: str,
        plan: Plan,
        started: float,
        deadline: float,
        done: asyncio.Future[ReadReport],
    ) -> None:
        peer = self._peers.get(agent_name)
        try:
            if peer is None:
                raise HandoffFailed(f"{agent_name} is not a peer of this worker, or no longer")
            chunks = plan(peer.description)
        except Exception as error:
            _deliver(done, error)
            return
        read = _Read(peer, deque(chunks), started, deadline, done)
        self._reads.append(read)
        self._last_event = time.monotonic()
        self._advance(read)

    def _cancel(self, done: asyncio.Future[ReadReport]) -> None:
        for read in self._reads:
            if read.done is done:
                read.fail(HandoffFailed("cancelled"))

    def _stop(self) -> None:
        for read in self._reads:
            read.fail(HandoffFailed("this worker is stopping"))

    def _advance(self, read: _Read) -> None:
        """Take in what has arrived, ask for what comes next, and settle the read when nothing is left."""
        for handle in list(read.in_flight):
            self._poll(read, handle)
        now = time.monotonic()
        if now > read.deadline:
            read.fail(HandoffFailed(f"{read.source} did not deliver within {now - read.started:.1f} s"))
        while read.chunks and len(read.in_flight) < CHUNKS_IN_FLIGHT and not read.peer.broken:
            try:
                handle = self._agent_connected_to(read.peer).start(read.source, read.chunks[0])
            except HandoffFailed as error:
                self._break(read, error)
            else:
                read.in_flight[handle] = read.chunks.popleft()
                self._poll(read, handle)
        if not read.in_flight and not read.chunks:
            self._reads.remove(read)
            _deliver(read.done, read.failure or ReadReport(read.moved, time.monotonic() - read.started))

    def _poll(self, read: _Read, handle: Handle) -> None:
        assert self._agent is not None
        try:
            if self._agent.state(handle) == "running":
                return
            read.moved += read.in_flight[handle].bytes
        except HandoffFailed as error:
            if read.failure is None:
                read.chunks.appendleft(read.in_flight[handle])
            self._break(read, HandoffFailed(f"reading from {read.source} failed: {error}"))
        self._last_event = time.monotonic()
        self._agent.release(handle)
        del read.in_flight[handle]

    def _break(self, read: _Read, error: HandoffFailed) -> None:
        """Give the connection up. The read goes on with the next, once: one that had stood idle may have
        broken long ago, in a network that is whole again."""
        read.peer.broken = True
        if read.broke_on is None:
            read.broke_on = read.peer.connections
        elif read.broke_on != read.peer.connections:
            read.fail(error)

    def _agent_connected_to(self, peer: _Peer) -> Agent:
        """The agent, created on first use, with a path to `peer`. Raises HandoffFailed."""
        if not peer.connected:
            peer.connections += 1
        if self._agent is None:
            self._generation += 1
            try:
                agent = Agent.reading(f"{self._name}/reader-{self._generation}", self._pool)
                agent.register(self.scratch, self._scratch.nbytes)
            except TransferUnavailable as error:
                raise HandoffFailed(error.message) from error
            self._agent = agent
        if not peer.connected:
            self._agent.connect(peer.description.agent_name, peer.description.agent_metadata)
            peer.connected = True
        return self._agent

    def _add_peer(self, description: PoolDescription) -> None:
        known = self._peers.get(description.agent_name)
        if known is not None and known.description == description:
            return
        for name, peer in list(self._peers.items()):
            if peer.description.worker_id == description.worker_id:
                self._remove_peer(name)
        peer = _Peer(description)
        self._agent_connected_to(peer)
        self._peers[description.agent_name] = peer

    def _remove_peer(self, agent_name: str) -> None:
        peer = self._peers.pop(agent_name, None)
        if peer is None:
            return
        for read in self._reads:
            if read.peer is peer:
                read.fail(HandoffFailed(f"{agent_name} was removed; its worker has gone or restarted"))
        peer.broken = True
        self._retired.append(peer)
        self._disconnect_broken()

    def _disconnect_broken(self) -> None:
        """Let go of connections that are to go and that nothing uses; the next read connects afresh."""
        in_use = {id(read.peer) for read in self._reads if read.in_flight}
        for peer in [*self._peers.values(), *self._retired]:
            if peer.broken and id(peer) not in in_use:
                if peer.connected and self._agent is not None:
                    self._agent.disconnect(peer.description.agent_name)
                peer.connected = peer.broken = False
        self._retired = [peer for peer in self._retired if peer.connected]

    def _destroy_agent(self) -> None:
        """The one way to stop bytes that may still come. Reads that have not failed ask again for theirs."""
        if self._agent is None:
            return
        for read in self._reads:
            for handle, chunk in read.in_flight.items():
                self._agent.release(handle)
                if read.failure is None:
                    read.chunks.appendleft(chunk)
            read.in_flight.clear()
        self._agent.close()
        self._agent = None
        for peer in self._peers.values():
            peer.connected = peer.broken = False
        self._retired.clear()


def _raise(error: Exception) -> None:
    raise error


def _deliver(done: asyncio.Future[Result], outcome: Result | Exception) -> None:
    """Settle `done` from another thread."""

    def settle() -> None:
        if done.done():
            return
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        done.get_loop().call_soon_threadsafe(settle)


async def _settled(done: asyncio.Future[Result], on_cancel: Callable[[], None]) -> Result:
    """Wait for `done` to the end even when cancelled: then `on_cancel` hurries it, and the cancel follows."""
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        on_cancel()
        while not done.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([done])
        done.exception()  # seen: the caller gets the cancellation
        raise
