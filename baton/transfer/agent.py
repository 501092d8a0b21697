"""One NIXL agent with the pool registered: the only file that talks to NIXL.

NIXL's own `nixl_agent` class is not used because it fixes the delay of UCX's progress thread at 0, which
makes that thread spin: 98 % of a core when idle. With a delay the same thread sleeps on UCX's event
descriptor and wakes when a peer's message comes: 0.1 %. The bindings below that class take the delay.
"""

from __future__ import annotations

import os
from typing import Any, Literal, cast

from baton.errors import HandoffFailed
from baton.transfer.base import Pool, Side, TransferUnavailable
from baton.transfer.chunks import Chunk

SLEEP_US = 50_000
"""How long the progress thread sleeps when nothing wakes it: the delay of a peer whose wake-up got lost."""

ENVIRONMENT = {
    # connect() to an address that swallows packets blocks for minutes and every other read with it.
    "UCX_TCP_CONN_NB": "y",
    # UCX logs to stdout by default, where baton's commands print their results.
    "UCX_LOG_FILE": "stderr",
}
"""What baton sets for UCX where the user has not. Choosing devices (UCX_NET_DEVICES) and transports (UCX_TLS)
stays with the user: a read over a dead one fails at its deadline, and `baton doctor` shows the choice."""

TransferState = Literal["running", "done"]
Handle = int


def load_nixl() -> Any:
    """The `nixl` module, with UCX's environment prepared.

    Raises:
        TransferUnavailable: it is not installed or does not load.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import nixl
    except ImportError as error:
        raise TransferUnavailable(
            f"NIXL cannot be loaded ({error}); `pip install nixl`, or start with --transfer inprocess where "
            "prefill and decode share one process"
        ) from error
    return nixl


class Agent:
    """A NIXL agent and the memory registered with it. Every method from one thread at a time."""

    def __init__(self, name: str, pool: Pool, progress_thread: bool) -> None:
        self._nixl = nixl = load_nixl()
        self._errors = tuple(
            value for key, value in vars(nixl).items() if key.startswith("nixl") and key.endswith("Error")
        )
        config = nixl.nixlAgentConfig()
        config.useProgThread = progress_thread
        config.pthrDelay = SLEEP_US
        config.useListenThread = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        self._memory = {"DRAM": nixl.DRAM_SEG, "VRAM": nixl.VRAM_SEG}
        try:
            self._agent = nixl.nixlAgent(name, config)
            self._backend = self._agent.createBackend("UCX", {})
        except self._errors as error:
            raise TransferUnavailable(
                f"NIXL cannot start its UCX backend ({error}); run `baton doctor`"
            ) from error
        self.register(pool.side, pool.size_bytes)

    @classmethod
    def serving(cls, name: str, pool: Pool) -> Agent:
        """An agent that answers peers from a thread of its own, asleep while there are none."""
        return cls(name, pool, progress_thread=True)

    @classmethod
    def reading(cls, name: str, pool: Pool) -> Agent:
        """An agent that makes progress only inside `state`."""
        return cls(name, pool, progress_thread=False)

    def register(self, memory: Side, length: int) -> None:
        """Raises TransferUnavailable when the memory cannot be registered."""
        descriptors = self._nixl.nixlRegDList(
            self._memory[memory.memory_type], [(memory.address, length, memory.device_id, "")]
        )
        try:
            self._agent.registerMem(descriptors, [self._backend])
        except self._errors as error:
            raise TransferUnavailable(
                f"NIXL cannot register {length} bytes of {memory.memory_type} ({error}); check `ulimit -l` "
                "and the GPU driver with `baton doctor`"
            ) from error

    @property
    def metadata(self) -> bytes:
        return cast(bytes, self._agent.getLocalMD())

    def connect(self, agent_name: str, metadata: bytes) -> None:
        """Raises HandoffFailed when the metadata is not that of `agent_name` or no path leads there."""
        try:
            found = self._agent.loadRemoteMD(metadata).decode()
        except (*self._errors, UnicodeDecodeError) as error:
            raise HandoffFailed(f"cannot connect to {agent_name}: {error}") from error
        if found != agent_name:
            self._agent.invalidateRemoteMD(found)
            raise HandoffFailed(f"the metadata of {agent_name} is that of {found}")

    def disconnect(self, agent_name: str) -> None:
        """No transfer to the peer may be running: NIXL frees the keys that it would still use."""
        self._agent.invalidateRemoteMD(agent_name)

    def start(self, agent_name: str, chunk: Chunk) -> Handle:
        """Ask for a chunk. May copy it right here (shared memory does). Raises HandoffFailed."""
        handle = None
        try:
            handle = self._agent.createXferReq(
                self._nixl.NIXL_READ,
                self._nixl.nixlXferDList(self._memory[chunk.destination_memory], chunk.destination),
                self._nixl.nixlXferDList(self._memory[chunk.source_memory], chunk.source),
                agent_name,
                "",
                [self._backend],
            )
            self._agent.postXferReq(handle, "")
        except self._errors as error:
            if handle is not None:
                self.release(handle)
            raise HandoffFailed(f"reading from {agent_name} failed: {error}") from error
        return cast(Handle, handle)

    def state(self, handle: Handle) -> TransferState:
        """Make progress on every transfer of this agent and tell about one. Raises HandoffFailed."""
        try:
            status = self._agent.getXferStatus(handle)
        except self._errors as error:
            raise HandoffFailed(str(error)) from error
        return "running" if status == self._nixl.NIXL_IN_PROG else "done"

    def release(self, handle: Handle) -> None:
        """Free the request. Of a running one the bytes still come: UCX cannot take back a get."""
        try:
            self._agent.releaseXferReq(handle)
        except self._errors:
            # Only a request that cannot be cancelled; it goes with the agent.
            return

    def close(self) -> None:
        """Tear every connection down and deregister: after this nothing is written or read any more."""
        del self._agent
