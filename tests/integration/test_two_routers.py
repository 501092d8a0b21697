"""Two routers behind one port: each counts what the other has just promised to workers."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest

from tests.cluster import Cluster
from tests.conftest import StartCluster

WORKERS = 3
BURST = 6
PREFIX_TOKENS = 256
OWN_TOKENS = 128
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def pair(start_cluster: StartCluster) -> Iterator[Cluster]:
    # Workers that are stopped for a while must not count as gone.
    with start_cluster("--hybrid", str(WORKERS), "--routers", "2", "--worker-ttl-s", "60") as up:
        yield up


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Processes that do nothing while the block lasts, so that no worker reports what it was given."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def complete(router: str, prompt: list[int]) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{router}/v1/completions", json=body, timeout=60)


def until_unready(router: str) -> None:
    """Wait until a router that has just started says that it cannot place anything."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{router}/ready", timeout=10).status_code == 503:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def seen_by(router: str) -> dict[str, tuple[int, int]]:
    """Requests and prompt tokens that each worker has waiting, as the router sees it."""
    route = httpx.post(f"{router}/debug/route", json={"prompt": [1], "max_tokens": 1}, timeout=60).json()
    workers = [candidate["decode"] for candidate in route["candidates"]]
    return {worker["worker"]: (worker["waiting"], worker["queued_tokens"]) for worker in workers}


def until_both_see(one: str, two: str, waiting: int) -> dict[str, tuple[int, int]]:
    """What both routers see, as soon as they see the same, so many requests wait, and nothing else."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        first, second = seen_by(one), seen_by(two)
        requests, tokens = (sum(counts) for counts in zip(*first.values(), strict=True))
        if first == second and requests == waiting and (tokens > 0) == (waiting > 0):
            return first
        assert time.monotonic() < deadline, (first, second)
        time.sleep(0.01)


def test_a_burst_through_both_spreads_and_each_counts_what_the_other_promised(pair: Cluster) -> None:
    pids = pair.pids()
    one, two = (f"http://127.0.0.1:{name.split()[1]}" for name in pids if name.startswith("router"))
    draw = random.Random(3)
    prefix = [draw.randrange(100, 4000) for _ in range(PREFIX_TOKENS)]
    assert complete(one, prefix).status_code == 200  # from here on one worker has it
    until_both_see(one, two, 0)
    with ThreadPoolExecutor(BURST) as clients:
        with stopped([pid for name, pid in pids.items() if name.startswith("hybrid")]):
            answers = []
            for number in range(BURST):
                own = [draw.randrange(100, 4000) for _ in range(OWN_TOKENS)]
                answers.append(clients.submit(complete, (one, two)[number % 2], prefix + own))
                seen = until_both_see(one, two, number + 1)
            waiting = [requests for requests, _ in seen.values()]
            assert len(waiting) == WORKERS
            assert max(waiting) < BURST, "not all went to the one that has the prefix"
            assert sum(tokens for _, tokens in seen.values()) >= BURST * OWN_TOKENS
        assert [answer.result().status_code for answer in answers] == [200] * BURST


def test_a_router_that_knows_no_worker_yet_leaves_requests_to_the_other(pair: Cluster) -> None:
    pids = pair.pids()
    killed = next(name for name in pids if name.startswith("router"))
    own = f"http://127.0.0.1:{killed.split()[1]}"
    with stopped([pids["kvstore"]]):
        os.kill(pids[killed], signal.SIGKILL)
        until_unready(own)
        answers = [complete(pair.base_url, [number] * 20) for number in range(100, 116)]
        assert [answer.status_code for answer in answers] == [200] * 16
