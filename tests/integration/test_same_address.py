"""A worker restarted where it was, in the middle of a handoff, is another one; nobody confuses the two."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from baton.rpc.v1 import worker_pb2
from tests.integration.handoff_proxy import HandoffProxy, Moment
from tests.integration.handoffs import (
    CHUNK,
    answers_rightly,
    ask,
    at_rest,
    held,
    prompt_of,
    start_of,
    status_at,
    undisturbed,
)
from tests.integration.kvstore_processes import ROOT, KvstoreProcess, Process
from tests.waiting import until


class WorkerProcess(Process):
    """A worker of the bundled model, on the same port every time it starts."""

    def __init__(self, log: Path, role: str, kvstore: str) -> None:
        super().__init__(log)
        self._role = role
        self._kvstore = kvstore

    def command(self) -> list[str]:
        place = ["--worker-id", self._role, "--worker-port", str(self.port), "--kvstore", self._kvstore]
        size = ["--kv-blocks", "256", "--max-batch-tokens", str(CHUNK), "--threads", "1", "--kv-verify"]
        model = ["--model", str(ROOT / "models" / "baton-small")]
        return [sys.executable, "-m", f"services.{self._role}", *model, *place, *size]


@dataclass(frozen=True)
class Pair:
    prefill: WorkerProcess
    decode: WorkerProcess


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    kvstore = KvstoreProcess(tmp_path / "kvstore.log")
    workers = [
        WorkerProcess(tmp_path / f"{role}.log", role, kvstore.address) for role in ("prefill", "decode")
    ]
    try:
        await kvstore.start()
        await asyncio.gather(*(worker.start() for worker in workers))
        yield Pair(*workers)
    finally:
        for process in (*workers, kvstore):
            process.kill()


async def test_a_prefill_worker_restarted_in_a_handoff_is_not_read_for_the_one_before(pair: Pair) -> None:
    prompt, prefill, decode = prompt_of(1), pair.prefill.address, pair.decode.address
    expected = await undisturbed(decode, prompt)
    before = status_at(prefill).incarnation

    async def restart(now: Moment, message: Any) -> None:
        if now == ("blocks_ready", 5):  # the last ones: they are read from whoever is there now
            pair.prefill.kill()
            await pair.prefill.start()

    async with HandoffProxy(prefill).serving() as between:
        between.before = restart
        asked = await ask(decode, start_of(prompt, between.address, before))
    assert asked.error == worker_pb2.RequestError.HANDOFF_FAILED
    assert asked.tokens == expected[: len(asked.tokens)]
    assert status_at(prefill).incarnation != before
    # As a router asks that has not heard of it yet.
    late = await ask(decode, start_of(prompt, prefill, before))
    assert (late.error, late.tokens) == (worker_pb2.RequestError.HANDOFF_FAILED, [])
    await at_rest(decode, prefill)
    assert await answers_rightly(decode, prefill, prompt, expected) > 0


async def test_a_decode_worker_restarted_in_a_handoff_reads_beside_the_lease_of_the_one_before(
    pair: Pair,
) -> None:
    """Its predecessor's connection is half open meanwhile, and says its last word only afterwards."""
    prompt, prefill, decode = prompt_of(2), pair.prefill.address, pair.decode.address
    expected = await undisturbed(decode, prompt)
    before = status_at(decode).incarnation
    go_on = asyncio.Event()

    async def hold_back(now: Moment, message: Any) -> None:
        if now == ("done", 1):
            await go_on.wait()

    async with HandoffProxy(prefill).serving() as between:
        between.before, between.half_open = hold_back, go_on
        async with asyncio.TaskGroup() as tasks:
            start = start_of(prompt, between.address, status_at(prefill).incarnation)
            asking = tasks.create_task(ask(decode, start))
            await until(lambda: ("done", 1) in between.seen, "decode has read everything")
            pair.decode.kill()
            await pair.decode.start()
        assert asking.result().lost
        assert status_at(decode).incarnation != before
        again = await ask(decode, start_of(prompt, prefill, status_at(prefill).incarnation))
        assert again.tokens == expected
        assert held(prefill)[2] == 1, "the lease of the one before is still there"
        go_on.set()
        await at_rest(decode, prefill)
    another = prompt_of(3)
    assert await answers_rightly(decode, prefill, another, await undisturbed(decode, another)) > 0
