"""Real Redis servers for tests: alone, behind a Sentinel or as a Cluster, in the clear or by TLS only."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.ports import unused_port
from tests.integration.kvstore_processes import DEADLINE_S, ROOT, Process, until

USER = "baton"
PASSWORD = "secret"


def documented_permissions() -> list[str]:
    """What docs/redis.md says that baton's user must be allowed."""
    line = re.search(rf"^ACL SETUSER {USER} on >PASSWORD (.*)$", (ROOT / "docs/redis.md").read_text(), re.M)
    assert line is not None
    return line[1].split()


@dataclass(frozen=True)
class Tls:
    """A key, and a certificate for 127.0.0.1 that vouches for itself."""

    key: Path
    certificate: Path

    @classmethod
    def make(cls, folder: Path) -> Tls:
        made = cls(folder / "key.pem", folder / "certificate.pem")
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
                *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", str(made.key), "-out", str(made.certificate)),
            ],
            check=True,
            capture_output=True,
            timeout=DEADLINE_S,
        )
        return made

    def server_settings(self, port: int) -> dict[str, str]:
        """Settings of a server that speaks TLS on `port` and nothing else, also to other servers."""
        return {
            "port": "0",
            "tls-port": str(port),
            "tls-key-file": str(self.key),
            "tls-cert-file": str(self.certificate),
            "tls-ca-cert-file": str(self.certificate),
            "tls-auth-clients": "no",
            "tls-replication": "yes",
        }


class RedisServer(Process):
    """Any process of Redis: how it listens and how it is asked."""

    def __init__(self, log: Path, tls: Tls | None = None) -> None:
        super().__init__(log)
        self.tls = tls

    @property
    def settings(self) -> dict[str, str]:
        listening = {"port": str(self.port)} if self.tls is None else self.tls.server_settings(self.port)
        return {"bind": "127.0.0.1", "dir": str(self._log.parent), **listening}

    def url_of(self, kind: str, where: str) -> str:
        """Such as `rediss+sentinel://...` for the kind `+sentinel`; with the user and the certificate."""
        scheme, options = "redis", ""
        if self.tls is not None:
            scheme, options = "rediss", f"?ssl_ca_certs={self.tls.certificate}"
        return f"{scheme}{kind}://{USER}:{PASSWORD}@{where}{options}"

    def client(self) -> list[str]:
        """The command line of a redis-cli for it."""
        tls = [] if self.tls is None else ["--tls", "--cacert", str(self.tls.certificate)]
        return ["redis-cli", "-h", "127.0.0.1", "-p", str(self.port), *tls]

    def ask(self, *command: str) -> str:
        """What redis-cli prints for the command."""
        cli = [*self.client(), *command]
        ended = subprocess.run(cli, check=True, capture_output=True, text=True, timeout=DEADLINE_S)
        return ended.stdout.strip()


class RedisProcess(RedisServer):
    """A redis-server that writes to disk only when it is asked to; knows baton's user."""

    @property
    def url(self) -> str:
        return self.url_at(self.address)

    def url_at(self, address: str) -> str:
        """The URL of the server where it is reached at `address`."""
        return self.url_of("", f"{address}/0")

    def command(self) -> list[str]:
        flags = [part for name, value in self.settings.items() for part in (f"--{name}", value)]
        user = ["--user", USER, "on", f">{PASSWORD}", *documented_permissions()]
        return ["redis-server", *flags, "--save", "", *user]

    @contextmanager
    def monitored(self) -> Iterator[Callable[[], list[list[str]]]]:
        """While the block lasts, note every command, those of scripts too; gives a function that lists them,
        each as its lower-case name and its arguments, as redis-cli prints them."""
        noted = self._log.with_suffix(".monitor")
        with noted.open("wb") as out:
            monitor = subprocess.Popen([*self.client(), "monitor"], stdin=subprocess.DEVNULL, stdout=out)
        try:
            yield lambda: [_monitored(line) for line in noted.read_text().splitlines() if "] " in line]
        finally:
            monitor.kill()
            monitor.wait()


def _monitored(line: str) -> list[str]:
    """Such as ["hdel", "key", "field"] of `1700000000.000000 [0 lua] "hdel" "key" "field"`."""
    name, *arguments = line.partition("] ")[2].removeprefix('"').removesuffix('"').split('" "')
    return [name.lower(), *arguments]


class RedisNodeProcess(RedisProcess):
    """One node of a Redis Cluster that is yet to be formed by `form_redis_cluster`."""

    def __init__(self, log: Path, tls: Tls | None = None) -> None:
        super().__init__(log, tls)
        self._bus_port = unused_port("127.0.0.1")

    @property
    def settings(self) -> dict[str, str]:
        return {
            **super().settings,
            "cluster-enabled": "yes",
            "cluster-config-file": str(self._log.with_suffix(".nodes")),
            "cluster-port": str(self._bus_port),
            **({} if self.tls is None else {"tls-cluster": "yes"}),
        }


async def form_redis_cluster(nodes: Sequence[RedisNodeProcess]) -> str:
    """Deal the slots out to `nodes` and wait until each says that the cluster is whole; returns its URL."""
    addresses = [node.address for node in nodes]
    nodes[0].ask("--cluster", "create", *addresses, "--cluster-yes")

    def whole(node: RedisNodeProcess) -> bool:
        return "cluster_state:ok" in node.ask("cluster", "info")

    await until(lambda: all(whole(node) for node in nodes), "the Redis Cluster is whole")
    return nodes[0].url_of("+cluster", ",".join(addresses))


class SentinelProcess(RedisServer):
    """A Redis Sentinel, alone a quorum, that watches `master` under the name `main`."""

    def __init__(self, log: Path, master: RedisProcess) -> None:
        super().__init__(log, master.tls)
        self._master = master

    @property
    def url(self) -> str:
        return self.url_of("+sentinel", f"{self.address}/main/0")

    def command(self) -> list[str]:
        config = self._log.with_suffix(".conf")
        lines = [
            *(f"{name} {value}" for name, value in self.settings.items()),
            f"sentinel monitor main 127.0.0.1 {self._master.port} 1",
            "sentinel down-after-milliseconds main 500",
            "sentinel failover-timeout main 2000",
        ]
        config.write_text("\n".join(lines) + "\n")
        return ["redis-server", str(config), "--sentinel"]

    def _ready(self) -> bool:
        return super()._ready() or "+monitor master" in self.log
