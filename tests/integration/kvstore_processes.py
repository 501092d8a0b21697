"""Processes for tests on ports of their own, which can be killed and come back: the kvstore among them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from baton.ports import unused_port
from tests.waiting import until

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 30.0


class Process(ABC):
    """A process on a fixed port, so that it can come back where it was."""

    def __init__(self, log: Path) -> None:
        self.port = unused_port("127.0.0.1")
        self.address = f"127.0.0.1:{self.port}"
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._said_before = 0

    @abstractmethod
    def command(self) -> list[str]:
        """The command line that starts it."""

    async def start(self) -> Self:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
        with self._log.open("ab") as log:
            self._said_before = log.tell()
            self._process = subprocess.Popen(
                self.command(), cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        await until(self._ready, f"{self.command()} is ready")
        return self

    @property
    def pid(self) -> int | None:
        """Of the running process, if it runs."""
        return self._process.pid if self._process is not None else None

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{self.command()} ended:\n{self.log}"
        return "ready" in self.log[self._said_before :].lower()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and wait for the end; returns the exit status. Does nothing when it has ended."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        try:
            return self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()
            self._process = None

    async def pause(self, seconds: float) -> None:
        """Let it do nothing for so long, as on a machine that is paused."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    @property
    def log(self) -> str:
        return self._log.read_text()


class KvstoreProcess(Process):
    """A kvstore; `redis` is a URL, or empty for the memory backend."""

    def __init__(
        self, log: Path, *, redis: str = "", ttl_s: float = 3.0, index_max_bytes: int = 1 << 30
    ) -> None:
        super().__init__(log)
        self._index_max_bytes = index_max_bytes
        self._redis = redis
        self._ttl_s = ttl_s
        self._metrics_port = unused_port("127.0.0.1")

    def command(self) -> list[str]:
        ports = ["--kvstore-port", str(self.port), "--metrics-port", str(self._metrics_port)]
        chosen = ["--worker-ttl-s", str(self._ttl_s), *(["--redis", self._redis] if self._redis else [])]
        bound = ["--index-max-bytes", str(self._index_max_bytes)]
        return [sys.executable, "-m", "services.kvstore", *ports, *chosen, *bound]

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of one sample on /metrics, None when it is not there."""
        with urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=DEADLINE_S) as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return float(sample.value)
        return None
