"""Does NIXL work on this machine, how fast, and over what? A real read between two processes."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection

import msgspec
import torch

from baton.errors import BatonError
from baton.kv.hashing import KvLayout
from baton.transfer import create_transfer
from baton.transfer.agent import load_nixl
from baton.transfer.base import TransferUnavailable

BLOCK_BYTES = 1024 * 1024
READ_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class LoopbackReport:
    """What one read of `bytes` bytes of CPU memory between two processes of this machine showed.

    `path` is UCX's own account of what it read over ("zero-copy cma/memory", "software emulation tcp/lo"),
    and "unknown" when it gave none.
    """

    bytes: int
    seconds: float
    nixl_version: str
    plugins: tuple[str, ...]
    path: str

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds


def loopback_check(size_bytes: int = 64 * BLOCK_BYTES, timeout_s: float = 60.0) -> LoopbackReport:
    """Read `size_bytes` (a multiple of 1 MiB) from one new process into another and compare every byte.

    The environment's UCX settings apply, so this shows what workers started here would use.

    Raises:
        TransferUnavailable: it did not work; the message ends with what NIXL and UCX said last.
    """
    command = [sys.executable, "-m", "baton.transfer.loopback", str(size_bytes)]
    environ = {**os.environ, "UCX_PROTO_INFO": "used", "UCX_LOG_FILE": "stderr"}
    try:
        child = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TransferUnavailable(
            f"a NIXL read between two processes did not end within {timeout_s:.0f} s; set UCX_NET_DEVICES to "
            "the network device to use, or UCX_TLS=tcp,self to rule the others out"
        ) from error
    if child.returncode != 0:
        last = " / ".join(child.stderr.strip().splitlines()[-3:])
        raise TransferUnavailable(f"a NIXL read between two processes failed: {last}")
    report = msgspec.json.decode(child.stdout.splitlines()[-1], type=LoopbackReport)
    return replace(report, path=path_in(child.stderr))


def path_in(log: str) -> str:
    """What UCX used for its gets, from the table that UCX_PROTO_INFO=used makes it log."""
    rows: list[str] = []
    in_gets = False
    for line in log.splitlines():
        if "remote memory read" in line:
            in_gets = True
        row = re.search(r"\|\s*\d+\s*\|[^|]*\|\s*([^|]+?)\s*\|\s*([^|]+?)\s*\|\s*$", line)
        if row and in_gets:
            rows.append(f"{row[1]} {row[2]}")
    return ", ".join(dict.fromkeys(rows)) or "unknown"


def _layout() -> KvLayout:
    return KvLayout("loopback", "int64", block_size=16, block_bytes=BLOCK_BYTES, format="loopback")


def _pattern(size_bytes: int) -> torch.Tensor:
    return torch.arange(size_bytes // 8, dtype=torch.int64).view(-1, BLOCK_BYTES // 8)


def _source(pipe: Connection, size_bytes: int) -> None:
    """The other process: holds a pool until the pipe closes."""
    storage = _pattern(size_bytes)
    transfer = create_transfer("nixl", storage, _layout(), "loopback-source", "1")
    pipe.send(transfer.describe())
    pipe.poll(None)
    transfer.close()


async def _read(size_bytes: int) -> LoopbackReport:
    ours, theirs = get_context("spawn").Pipe()
    source = get_context("spawn").Process(target=_source, args=(theirs, size_bytes), daemon=True)
    source.start()
    theirs.close()
    expected = _pattern(size_bytes)
    storage = torch.zeros_like(expected)
    transfer = create_transfer("nixl", storage, _layout(), "loopback-reader", "1")
    try:
        if not await asyncio.to_thread(ours.poll, READ_TIMEOUT_S):
            raise TransferUnavailable("the source process did not start")
        description = ours.recv()
        await transfer.add_peer(description)
        await transfer.warm_up(description.agent_name, READ_TIMEOUT_S)
        blocks = range(len(storage))
        report = await transfer.read(description.agent_name, blocks, blocks, READ_TIMEOUT_S)
        if not torch.equal(storage, expected):
            raise TransferUnavailable("the bytes read are not the bytes of the source")
    finally:
        transfer.close()
        ours.close()
        source.join()
    nixl = load_nixl()
    return LoopbackReport(
        bytes=report.bytes,
        seconds=report.seconds,
        nixl_version=version("nixl"),
        plugins=tuple(sorted(nixl.nixlAgent("plugins", nixl.nixlAgentConfig()).getAvailPlugins())),
        path="unknown",
    )


def _main() -> None:
    try:
        report = asyncio.run(_read(int(sys.argv[1])))
    except BatonError as error:
        sys.exit(error.message)
    print(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    _main()
