"""A cluster under load whose Redis fails in every way and whose kvstore is killed: what was seen of that."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import Cluster, run_cluster
from tests.integration.redis_processes import RedisProcess
from tests.integration.slow_proxy import SlowProxy

LATENCY_S = 0.2
"""What the slow Redis takes longer for an answer."""

OUTAGE_S = 1.5
"""How long the killed and the full Redis stay so."""

SHOWN_S = 15.0
"""Until the metrics have to say what is wrong."""

RECOVERY_S = 20.0
"""Until everything has to be as before, once what was wrong no longer is."""

_KV_BLOCKS = 128
_SHARED_TOKENS = 64
_OWN_TOKENS = 96
_OUTPUT_TOKENS = 12
_SAMPLE_INTERVAL_S = 0.1
_ANSWERS_DURING = 10


@dataclass(frozen=True)
class Outcome:
    """What one fault did.

    `requests` were answered meanwhile; `failed` says how others were not, `wrong` counts answers unlike the
    undisturbed ones. `index_stale_s` is the largest staleness of its index that the router exported,
    `redis_stale_s` the kvstore's of what Redis has. `recovery_s` is how long it took after the fault (of
    the kvstore: since it was killed) until all was as before. The rest are lines in the kvstore's and the
    router's log about it.
    """

    fault: str
    requests: int
    failed: tuple[str, ...]
    wrong: int
    index_stale_s: float
    redis_stale_s: float
    recovery_s: float
    redis_warnings: int
    kvstore_warnings: int


class Load:
    """Clients that stream answers one after the other, and compare each with the undisturbed one.

    The prompts share beginnings, and are more than the cluster's KV: blocks come and go all the time.
    """

    def __init__(self, base_url: str, prompts: int, clients: int) -> None:
        draw = random.Random(7)
        beginnings = [_tokens(_SHARED_TOKENS, draw) for _ in range(4)]
        self._prompts = [beginnings[n % 4] + _tokens(_OWN_TOKENS, draw) for n in range(prompts)]
        self._clients = clients
        self._http = httpx.AsyncClient(base_url=base_url, timeout=60)
        self._undisturbed: list[list[int]] = []
        self.answered = 0
        self.failed: list[str] = []
        self.wrong = 0

    async def __aenter__(self) -> Load:
        """Learn what the answers are."""
        self._undisturbed = [await self._ask(prompt) for prompt in self._prompts]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def run(self) -> None:
        """Ask until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(self._clients):
                tasks.create_task(self._client(random.Random(number)))

    async def _client(self, draw: random.Random) -> None:
        while True:
            number = draw.randrange(len(self._prompts))
            try:
                answer = await self._ask(self._prompts[number])
            except (httpx.HTTPError, ValueError) as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
            else:
                self.answered += 1
                self.wrong += answer != self._undisturbed[number]

    async def _ask(self, prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "max_tokens": _OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
        tokens: list[int] = []
        asked = {**body, "stream": True, "return_token_ids": True}
        async with self._http.stream("POST", "/v1/completions", json=asked) as response:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code}: {await response.aread()!r}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ValueError(str(event["error"]))
                    tokens += event["choices"][0]["token_ids"]
        return tokens


def _tokens(count: int, draw: random.Random) -> list[int]:
    return [draw.randrange(100, 4000) for _ in range(count)]


class FaultyCluster:
    """A running cluster, the Redis behind it, and the load on it."""

    def __init__(self, cluster: Cluster, redis: RedisProcess, proxy: SlowProxy, load: Load) -> None:
        self._cluster = cluster
        self._redis = redis
        self._proxy = proxy
        self._load = load
        self._index_lag_s: float | None = None
        self._connected: float | None = None
        self._redis_lag_s: float | None = None
        self._redis_up: float | None = None
        self._index_stale_s = 0.0
        self._redis_stale_s = 0.0

    async def outcomes(self) -> list[Outcome]:
        """Let everything happen that can, one thing after the other, under load."""
        async with httpx.AsyncClient(timeout=5) as http, asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(self._watch(http)), tasks.create_task(self._load.run())]
            await self._until(self._well, SHOWN_S, "all is well")
            start = self._redis.start
            done = [
                await self._suffer("Redis killed, back empty", self._kill_redis, start),
                await self._suffer("Redis killed, back with old data", self._kill_saved_redis, start),
                await self._suffer("Redis 200 ms slow", self._slow_down, self._speed_up, self._shows_lag),
                await self._suffer("Redis full", self._fill_redis, self._empty_redis),
                await self._suffer("kvstore killed", self._kill_kvstore, None, self._shows_loss),
            ]
            for task in background:
                task.cancel()
        return done

    async def _suffer(
        self,
        fault: str,
        begin: Callable[[], Awaitable[object]],
        end: Callable[[], Awaitable[object]] | None,
        shown: Callable[[], bool] | None = None,
    ) -> Outcome:
        load, redis_said, router_said = self._load, self._said_of_redis(), self._said_of_kvstore()
        answered, failed, wrong = load.answered, len(load.failed), load.wrong
        self._index_stale_s = self._redis_stale_s = 0.0
        began_s = time.monotonic()
        await begin()
        await self._until(shown or self._shows_redis_away, SHOWN_S, f"the metrics say: {fault}")
        if end is not None:
            during = load.answered
            await self._until(
                lambda: time.monotonic() > began_s + OUTAGE_S and load.answered >= during + _ANSWERS_DURING,
                60,
                "answers go on",
            )
            began_s = time.monotonic()
            await end()
        await self._until(self._well, RECOVERY_S, f"all is well after: {fault}")
        recovery_s = time.monotonic() - began_s
        after = load.answered
        await self._until(lambda: load.answered >= after + _ANSWERS_DURING, 60, "answers go on")
        return Outcome(
            fault=fault,
            requests=load.answered - answered,
            failed=tuple(load.failed[failed:]),
            wrong=load.wrong - wrong,
            index_stale_s=self._index_stale_s,
            redis_stale_s=self._redis_stale_s,
            recovery_s=recovery_s,
            redis_warnings=self._said_of_redis() - redis_said,
            kvstore_warnings=self._said_of_kvstore() - router_said,
        )

    # ---- the faults ---------------------------------------------------------------------------

    async def _kill_redis(self) -> None:
        self._redis.kill()

    async def _kill_saved_redis(self) -> None:
        self._redis.ask("save")
        self._redis.kill()

    async def _slow_down(self) -> None:
        self._proxy.delay_s = LATENCY_S / 2

    async def _speed_up(self) -> None:
        self._proxy.delay_s = 0.0

    async def _fill_redis(self) -> None:
        self._redis.ask("config", "set", "maxmemory", "1mb")

    async def _empty_redis(self) -> None:
        self._redis.ask("config", "set", "maxmemory", "0")

    async def _kill_kvstore(self) -> None:
        os.kill(self._cluster.pids()["kvstore"], signal.SIGKILL)

    # ---- what can be seen of them ---------------------------------------------------------------

    def _shows_redis_away(self) -> bool:
        return self._redis_up == 0 and (self._redis_lag_s or 0) > 0.5

    def _shows_lag(self) -> bool:
        return (self._redis_lag_s or 0) >= LATENCY_S / 2

    def _shows_loss(self) -> bool:
        return self._connected == 0 and (self._index_lag_s or 0) > 0

    def _well(self) -> bool:
        lag_s = self._redis_lag_s
        return (self._redis_up, self._connected, self._index_lag_s) == (1, 1, 0) and (
            lag_s is not None and lag_s < LATENCY_S / 2
        )

    def _said_of_redis(self) -> int:
        return self._cluster.logs()["kvstore"].count("WARNING")

    def _said_of_kvstore(self) -> int:
        return len(re.findall(r"the kvstore at .* is away", self._cluster.logs()["router"]))

    async def _watch(self, http: httpx.AsyncClient) -> None:
        while True:
            router = await _metrics(http, self._cluster.own_url)
            self._connected = router.get("baton_router_kvstore_connected")
            self._index_lag_s = router.get("baton_index_lag_seconds")
            port = re.findall(r"metrics on port (\d+)", self._cluster.logs()["kvstore"])[-1]
            kvstore = await _metrics(http, f"http://127.0.0.1:{port}")
            self._redis_up = kvstore.get("baton_kvstore_redis_up")
            self._redis_lag_s = kvstore.get("baton_kvstore_redis_lag_seconds")
            self._index_stale_s = max(self._index_stale_s, self._index_lag_s or 0)
            self._redis_stale_s = max(self._redis_stale_s, self._redis_lag_s or 0)
            await asyncio.sleep(_SAMPLE_INTERVAL_S)

    async def _until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            seen = (self._redis_up, self._redis_lag_s, self._connected, self._index_lag_s, self._load.failed)
            assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}; seen last: {seen}"
            await asyncio.sleep(0.02)


async def _metrics(http: httpx.AsyncClient, base_url: str) -> dict[str, float]:
    """Samples without labels by name; none when nobody answers."""
    try:
        text = (await http.get(f"{base_url}/metrics")).text
    except httpx.TransportError:
        return {}
    families = text_string_to_metric_families(text)
    return {one.name: one.value for family in families for one in family.samples if not one.labels}


@asynccontextmanager
async def faulty_cluster(folder: Path, prompts: int, clients: int) -> AsyncIterator[FaultyCluster]:
    """A cluster of two workers under load, with a Redis of its own; `folder` is an empty one."""
    async with AsyncExitStack() as stack:
        redis = RedisProcess(folder / "redis.log")
        stack.callback(redis.kill)
        await redis.start()
        proxy = await stack.enter_async_context(SlowProxy(redis.port).serving())
        flags = ("--hybrid", "2", "--kv-blocks", str(_KV_BLOCKS), "--redis", redis.url_at(proxy.address))
        up = run_cluster(folder, *flags)
        cluster = await asyncio.to_thread(up.__enter__)
        stack.callback(up.__exit__, None, None, None)
        load = await stack.enter_async_context(Load(cluster.base_url, prompts, clients))
        yield FaultyCluster(cluster, redis, proxy, load)
