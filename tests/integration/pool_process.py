"""A worker's pool in a process of its own, driven over a pipe: what the transfer tests read from and kill.

Run as `python pool_process.py FD`, FD being the inherited end of a `multiprocessing.connection` pipe.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from baton.kv.hashing import KvLayout
from baton.transfer import PoolDescription, create_transfer


def pattern(blocks: int, layout: KvLayout, seed: int) -> torch.Tensor:
    """A pool in which every 8-byte word of every block differs: int64 [blocks, block_bytes / 8]."""
    words = blocks * layout.block_bytes // 8
    return (torch.arange(words, dtype=torch.int64) * 2 + seed).view(blocks, -1)


class PoolProcess:
    """The parent's side of a pool process."""

    def __init__(
        self, worker_id: str, incarnation: str, layout: KvLayout, blocks: int = 64, seed: int = 0
    ) -> None:
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self._pipe.send((worker_id, incarnation, layout, blocks, seed))
        self._blocks, self._layout, self._seed = blocks, layout, seed

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def expected(self) -> torch.Tensor:
        """What the pool holds."""
        return pattern(self._blocks, self._layout, self._seed)

    def description(self, timeout_s: float = 60.0) -> PoolDescription:
        """Once, when the pool is up."""
        answer = self._receive(timeout_s)
        assert isinstance(answer, PoolDescription)
        return answer

    def ask(self, *command: Any, timeout_s: float = 60.0) -> Any:
        self._pipe.send(command)
        return self._receive(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and nothing of the process is left when this returns."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _receive(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"the pool process {self.pid} did not answer within {timeout_s} s")
        return self._pipe.recv()


def main() -> None:
    torch.set_num_threads(1)
    pipe = Connection(int(sys.argv[1]))
    worker_id, incarnation, layout, blocks, seed = pipe.recv()
    storage = pattern(blocks, layout, seed)
    transfer = create_transfer("nixl", storage, layout, worker_id, incarnation)
    pipe.send(transfer.describe())
    while True:
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            return
        match command:
            case "close":
                transfer.close()
                pipe.send(None)
            case "cpu":
                pipe.send(time.process_time())
            case "read_forever":
                _read_forever(transfer, arguments[0], pipe, blocks)
            case _:
                raise ValueError(command)


def _read_forever(transfer: Any, description: PoolDescription, pipe: Connection, blocks: int) -> None:
    """Become a reader that is only ever stopped by a signal."""

    async def run() -> None:
        await transfer.add_peer(description)
        await transfer.warm_up(description.agent_name, 30)
        pipe.send(None)
        everything = list(range(blocks))
        while True:
            await transfer.read(description.agent_name, everything, everything, 30)

    asyncio.run(run())


if __name__ == "__main__":
    main()
