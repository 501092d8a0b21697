"""A cluster that a test runs through `baton up`, as a user would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
UP = (sys.executable, "-m", "baton.cli.main", "up")
_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Cluster:
    """A cluster that `baton up` runs in a process of its own.

    `folder` holds its log files (`TMPDIR` of `baton up`) and what it printed (`stdout`, `stderr`).
    """

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def base_url(self) -> str:
        """Of the router's HTTP API, such as http://127.0.0.1:8000."""
        return self._printed(r"(https?://\S+)")

    @property
    def own_url(self) -> str:
        """Of the port that a router alone has, with its metrics; of several routers, the first one's."""
        return "http://" + self._printed(r"(\S+) \(metrics\)")

    @property
    def own_urls(self) -> list[str]:
        """Of the port that each router alone has."""
        ports = [name.split()[1] for name in self.pids() if name.startswith("router ")]
        return [f"http://127.0.0.1:{port}" for port in ports] or [self.own_url]

    @property
    def grpc_address(self) -> str:
        """Of the router's gRPC API (host:port)."""
        return self._printed(r"(\S+) \(gRPC\)")

    @property
    def kvstore_address(self) -> str:
        return self._printed(r"^kvstore +kvstore +(\S+)")

    def pids(self) -> dict[str, int]:
        """Of the running processes, by name: router, kvstore, prefill-0, decode-0 ...; of several routers,
        by `router PORT` with the port that is theirs alone."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            words = child.cmdline()
            if "--worker-id" in words:
                found[words[words.index("--worker-id") + 1]] = child.pid
            elif "--share-ports" in words:
                found[f"router {words[words.index('--metrics-port') + 1]}"] = child.pid
            else:
                found[next(word for word in words if word.startswith("services.")).split(".")[1]] = child.pid
        return found

    def workers(self) -> dict[str, str]:
        """Address of each registered worker, by id."""
        with grpc.insecure_channel(self.kvstore_address) as channel:
            registry = kvstore_pb2_grpc.RegistryStub(channel)
            snapshot = next(iter(registry.Watch(kvstore_pb2.WatchRequest(), timeout=10)))
        return {change.worker.worker_id: change.worker.address for change in snapshot.changes}

    def status(self, worker_id: str) -> worker_pb2.StatusResponse:
        """What the worker says of itself now."""
        with grpc.insecure_channel(self.workers()[worker_id]) as channel:
            admin = worker_pb2_grpc.WorkerAdminStub(channel)
            status: worker_pb2.StatusResponse = admin.Status(worker_pb2.StatusRequest(), timeout=10)
        return status

    def logs(self) -> dict[str, str]:
        """Text of each process's log file, by process name."""
        return {path.stem: path.read_text(errors="replace") for path in self.folder.glob("baton-*/*.log")}

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stop it as Ctrl-C would and return the exit status of `baton up`."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(_STOP_TIMEOUT_S)

    def _printed(self, pattern: str) -> str:
        found = re.search(pattern, self.stdout, re.MULTILINE)
        assert found is not None, f"`baton up` did not print {pattern}:\n{self.stdout}"
        return found[1]


running: list[Cluster] = []
"""The clusters that are up now."""


@contextmanager
def run_cluster(
    folder: Path, *flags: str, model: Path | str | None = None, environ: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """Run `baton up` with `flags` until the block ends; `folder` is an empty one for its files.

    Raises:
        AssertionError: it did not come up; with everything it printed.
    """
    command = [*UP, "--port", "0", "--grpc-port", "0", *flags]
    if model is not None:
        command += ["--model", str(model)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, "TMPDIR": str(folder), **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    cluster = Cluster(process, folder)
    running.append(cluster)
    try:
        _wait_ready(cluster)
        yield cluster
    finally:
        running.remove(cluster)
        try:
            cluster.stop()
        finally:
            process.kill()
            process.wait()


def _wait_ready(cluster: Cluster) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while "Ctrl-C stops everything" not in cluster.stdout:
        status = cluster.process.poll()
        assert status is None, f"`baton up` ended with status {status}:\n{cluster.stdout}{cluster.stderr}"
        assert time.monotonic() < deadline, f"`baton up` is not ready:\n{cluster.stderr}\n{cluster.logs()}"
        time.sleep(0.05)
