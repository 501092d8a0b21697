"""Which faults there are, and how they are done to the processes of a cluster and undone."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil

from tests.chaos.network import cut, reset
from tests.cluster import Cluster
from tests.integration.redis_processes import RedisProcess

_BACK_S = 90.0
# A process that vanishes for longer than this is noticed by keepalive, not only missed in the registry.
_LONG_S = (16.0, 19.0)
_LONG_SHARE = 0.06
_MEAN_S, _MOST_S = 1.2, 7.0
_AT_ONCE = 6


@dataclass(frozen=True)
class _Absence:
    """Whom a fault takes away, and for those that end by themselves: how long, and in which directions."""

    victim: str
    seconds: float
    deaf: bool
    mute: bool


@dataclass(frozen=True)
class Done:
    """A fault that was done to a process; from when to when, as `time.time`."""

    name: str
    victim: str
    began_s: float
    ended_s: float

    @property
    def kind(self) -> str:
        """Such as `cut prefill`."""
        return f"{self.name} {_role(self.victim)}"


Fault = Callable[[_Absence], Awaitable[None]]


class Faults:
    """Does faults to `cluster` and its Redis, drawn from a seed, until stopped; then everything is well.

    One worker that decodes and one router are always left alone: with all of them gone there is nobody who
    could answer.
    """

    def __init__(self, cluster: Cluster, redis: RedisProcess, seed: int, pause_s: float) -> None:
        """`pause_s` is the mean time between the beginnings of two faults."""
        self.done: list[Done] = []
        self._cluster = cluster
        self._redis = redis
        self._draw = random.Random(seed)
        self._pause_s = pause_s
        self._ill: set[str] = set()
        self._router_failed_s = 0.0
        workers: list[tuple[int, str, Fault]] = [
            (4, "kill", self._kill),
            (4, "stop", self._stop),
            (3, "drain", self._terminate),
            (4, "cut", self._cut),
            (2, "reset", self._reset),
        ]
        others: list[tuple[int, str, Fault]] = [
            (2, "kill", self._kill),
            (2, "stop", self._stop),
            (1, "restart", self._terminate),
            (2, "cut", self._cut),
            (1, "reset", self._reset),
        ]
        self._faults = {"prefill": workers, "decode": workers, "hybrid": workers}
        self._faults |= {"router": others, "kvstore": others, "redis": others}

    def router_failed(self, since_s: float) -> bool:
        """Whether a router has been disturbed in a way that ends its clients' connections since then.

        Connections may have broken a little before the request that found them broken.
        """
        ill = any(name.startswith("router") for name in self._ill)
        return ill or self._router_failed_s > since_s - 6.0

    async def run(self, seconds: float) -> None:
        """Begin faults for so long, and wait until all of them are undone."""
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            while time.monotonic() < until:
                if len(self._ill) < _AT_ONCE and (victim := self._victim()):
                    faults = self._faults[_role(victim)]
                    ((_, name, fault),) = self._draw.choices(faults, [weight for weight, _, _ in faults])
                    self._ill.add(victim)
                    tasks.create_task(self._do(name, fault, self._absence(victim)))
                await asyncio.sleep(self._draw.expovariate(1 / self._pause_s))

    async def _do(self, name: str, fault: Fault, absence: _Absence) -> None:
        victim, began_s = absence.victim, time.time()
        try:
            await fault(absence)
        finally:
            self.done.append(Done(name, victim, began_s, time.time()))
            if _role(victim) == "router":
                self._router_failed_s = time.monotonic()
            self._ill.discard(victim)

    def _absence(self, victim: str) -> _Absence:
        draw = self._draw
        deaf, mute = draw.choice(((True, True), (True, False), (False, True)))
        if draw.random() < _LONG_SHARE:
            return _Absence(victim, draw.uniform(*_LONG_S), deaf, mute)
        return _Absence(victim, min(_MOST_S, draw.expovariate(1 / _MEAN_S)), deaf, mute)

    def _victim(self) -> str | None:
        well = sorted({*self._pids(), "redis"} - self._ill)
        decoders = [name for name in well if _role(name) in ("decode", "hybrid")]
        routers = [name for name in well if _role(name) == "router"]
        spared = {kind[0] for kind in (decoders, routers) if len(kind) == 1}
        candidates = [name for name in well if name not in spared]
        return self._draw.choice(candidates) if candidates else None

    # ---- the faults ---------------------------------------------------------------------------

    async def _kill(self, absence: _Absence) -> None:
        if absence.victim == "redis":
            self._redis.kill()
            await self._redis.start()
        else:
            await self._until_replaced(absence.victim, signal.SIGKILL)

    async def _terminate(self, absence: _Absence) -> None:
        """The polite way: workers drain, routers let their streams end if they soon do."""
        if absence.victim == "redis":
            await asyncio.to_thread(self._redis.stop)
            await self._redis.start()
        else:
            await self._until_replaced(absence.victim, signal.SIGTERM)

    async def _stop(self, absence: _Absence) -> None:
        pid = self._pid(absence.victim)
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(absence.seconds)
        finally:
            os.kill(pid, signal.SIGCONT)

    async def _cut(self, absence: _Absence) -> None:
        pid = self._pid(absence.victim)
        await cut(pid, absence.seconds, self._everybody, deaf=absence.deaf, mute=absence.mute)

    async def _reset(self, absence: _Absence) -> None:
        reset(self._pid(absence.victim))

    # ---- the cluster --------------------------------------------------------------------------

    async def _until_replaced(self, victim: str, number: signal.Signals) -> None:
        """Signal the victim and wait until `baton up` says that another one is ready in its place."""
        before = self._pid(victim)
        os.kill(before, number)
        deadline = time.monotonic() + _BACK_S
        while not self._ready_again(victim, before):
            assert time.monotonic() < deadline, f"{victim} (pid {before}) is not back after {_BACK_S} s"
            await asyncio.sleep(0.1)

    def _ready_again(self, victim: str, before: int) -> bool:
        pid = self._pids().get(victim, before)
        return pid != before and bool(re.search(rf"ready again: .*, pid {pid}$", self._cluster.stderr, re.M))

    def _everybody(self) -> list[int]:
        redis = self._redis.pid
        return [*self._pids().values(), *([redis] if redis is not None else [])]

    def _pid(self, victim: str) -> int:
        pid = self._redis.pid if victim == "redis" else self._pids()[victim]
        assert pid is not None, f"{victim} does not run"
        return pid

    def _pids(self) -> dict[str, int]:
        """Of the processes that run now."""
        while True:
            try:
                return self._cluster.pids()
            except (psutil.Error, StopIteration):
                continue  # one has just ended, or is not yet the program it will be


def _role(name: str) -> str:
    """Of a process, by its name: `decode-0`, `router 4711`, `kvstore`."""
    return re.split("[- ]", name)[0]
