"""One of baton's processes, which lives and dies with the Serve replica that started it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_START_TIMEOUT_S = 1800.0
_CHECK_TIMEOUT_S = 5.0


class Gone(RuntimeError):
    """The process has exited; the message says with which status."""


class Process:
    """`python -m services.NAME` with the settings in `flags`, ready when `ready` says so.

    Args:
        flags: settings by name, such as {"worker_port": 4711}.
        stop_s: seconds it gets to finish what it has when it is stopped.
    """

    def __init__(
        self, name: str, flags: Mapping[str, object], ready: Callable[[], bool], stop_s: float
    ) -> None:
        self._name = name
        self._ready = ready
        self._stop_s = stop_s
        words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        # The kernel ends it with this replica, however that ends.
        command = [sys.executable, "-m", "baton.cli.child", str(os.getpid()), f"services.{name}", *words]
        self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def wait_ready(self) -> None:
        """
        Raises:
            Gone: it exited instead.
            TimeoutError: it took longer than half an hour.
        """
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self._ready():
            self.check()
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{self._name} was not ready after {_START_TIMEOUT_S:.0f} s")
            time.sleep(0.1)

    def check(self) -> None:
        """
        Raises:
            Gone: it has exited.
        """
        if self._child.poll() is not None:
            raise Gone(f"{self._name} exited with status {self._child.returncode}; its log says why")

    def stop(self) -> None:
        """Let it finish what it has, and end it if that takes too long."""
        self._child.terminate()
        try:
            self._child.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def serving(address: str) -> bool:
    """Whether the gRPC server at `address` says that it is well."""
    with grpc.insecure_channel(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_CHECK_TIMEOUT_S
            )
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def free_port(host: str) -> int:
    """A port of this node that nothing listens on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
