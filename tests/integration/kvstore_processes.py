"""Real kvstore and Redis processes for tests, on ports of their own, which can be killed and restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from baton.ports import unused_port

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 30.0


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition` holds; fail with `what` when it does not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < deadline, f"not in {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.01)


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

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    @property
    def log(self) -> str:
        return self._log.read_text()


class RedisProcess(Process):
    """A redis-server that keeps nothing on disk."""

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    def command(self) -> list[str]:
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._log.parent)]
        return ["redis-server", *where, "--save", ""]

    def ask(self, *command: str) -> str:
        """What redis-cli prints for the command."""
        cli = ["redis-cli", "-p", str(self.port), *command]
        return subprocess.run(
            cli, check=True, capture_output=True, text=True, timeout=DEADLINE_S
        ).stdout.strip()


class SecureRedisProcess(RedisProcess):
    """A redis-server that speaks TLS only and wants a password."""

    def __init__(self, log: Path, key: Path, certificate: Path) -> None:
        super().__init__(log)
        self._key = key
        self._certificate = certificate

    @property
    def url(self) -> str:
        return f"rediss://:secret@{self.address}/0?ssl_ca_certs={self._certificate}"

    def command(self) -> list[str]:
        files = ["--tls-key-file", str(self._key), "--tls-cert-file", str(self._certificate)]
        ports = ["--port", "0", "--tls-port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        return ["redis-server", *ports, *files, "--tls-auth-clients", "no", "--requirepass", "secret"]


class RedisNodeProcess(RedisProcess):
    """One node of a Redis Cluster that is yet to be formed by `form_redis_cluster`; knows one ACL user."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self._bus_port = unused_port("127.0.0.1")

    def command(self) -> list[str]:
        config = self._log.with_suffix(".nodes")
        cluster = ["--cluster-enabled", "yes", "--cluster-config-file", str(config)]
        ports = ["--cluster-port", str(self._bus_port)]
        user = ["--user", "baton", "on", ">secret", "~baton:1:*", "+@all"]
        return [*super().command(), *cluster, *ports, *user]


async def form_redis_cluster(nodes: Sequence[RedisNodeProcess]) -> None:
    """Deal the slots out to `nodes` and wait until each says that the cluster is whole."""
    addresses = [node.address for node in nodes]
    create = ["redis-cli", "--cluster", "create", *addresses, "--cluster-yes"]
    subprocess.run(create, check=True, capture_output=True, timeout=DEADLINE_S)

    def whole(node: RedisNodeProcess) -> bool:
        asked = ["redis-cli", "-p", str(node.port), "cluster", "info"]
        return "cluster_state:ok" in subprocess.run(asked, capture_output=True, text=True).stdout

    await until(lambda: all(whole(node) for node in nodes), "the Redis Cluster is whole")


class SentinelProcess(Process):
    """A Redis Sentinel, alone a quorum, that watches `master` under the name `main`."""

    def __init__(self, log: Path, master: RedisProcess) -> None:
        super().__init__(log)
        self._master = master

    @property
    def url(self) -> str:
        return f"redis+sentinel://{self.address}/main/0"

    def command(self) -> list[str]:
        config = self._log.with_suffix(".conf")
        watched = f"sentinel monitor main 127.0.0.1 {self._master.port} 1"
        timeouts = "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000"
        config.write_text(f"port {self.port}\nbind 127.0.0.1\n{watched}\n{timeouts}\n")
        return ["redis-server", str(config), "--sentinel"]

    def _ready(self) -> bool:
        return super()._ready() or "+monitor master" in self.log


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
