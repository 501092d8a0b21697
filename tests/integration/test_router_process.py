"""The router as a process, beside a real kvstore, in front of a worker that the test plays."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from baton.kv.events import Event
from baton.ports import unused_port
from baton.rpc.kvstore_client import WorkerMembership
from baton.rpc.v1 import kvstore_pb2, worker_pb2
from tests.integration.kvstore_processes import ROOT, KvstoreProcess, Process, until
from tests.unit.router.fakes import MODEL, FakeWorker, running_worker

ASK = {"prompt": [5, 6, 7], "max_tokens": 4}
SCRIPT = [300, 301, 302, 303]


class RouterProcess(Process):
    """A router whose kvstore is at `kvstore`."""

    def __init__(self, log: Path, kvstore: str) -> None:
        super().__init__(log)
        self._kvstore = kvstore
        self._metrics_port = unused_port("127.0.0.1")

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self._metrics_port}/metrics"

    def command(self) -> list[str]:
        ports = ["--port", str(self.port), "--grpc-port", "0", "--metrics-port", str(self._metrics_port)]
        return [
            sys.executable,
            "-m",
            "services.router",
            *ports,
            "--kvstore",
            self._kvstore,
            "--model",
            str(MODEL),
        ]


@asynccontextmanager
async def registered(worker: FakeWorker, kvstore: str) -> AsyncIterator[None]:
    """The worker in the registry."""

    async def snapshot() -> Sequence[Event]:
        return []

    described = kvstore_pb2.Worker(
        worker_id=worker.worker_id,
        incarnation="one",
        address=worker.address,
        role=worker_pb2.ROLE_HYBRID,
        layout=worker_pb2.KvLayout(model_fingerprint="f", dtype="float32", block_size=16, block_bytes=1024),
        max_model_len=16384,
        total_blocks=4096,
    )
    member = asyncio.create_task(WorkerMembership(kvstore, described, snapshot).run())
    try:
        yield
    finally:
        member.cancel()
        await asyncio.wait([member])


@pytest.fixture
async def kvstore(tmp_path: Path) -> AsyncIterator[KvstoreProcess]:
    process = await KvstoreProcess(tmp_path / "kvstore.log").start()
    yield process
    process.stop()


@pytest.fixture
async def router(tmp_path: Path, kvstore: KvstoreProcess) -> AsyncIterator[RouterProcess]:
    process = await RouterProcess(tmp_path / "router.log", kvstore.address).start()
    yield process
    process.stop()


async def until_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)


async def test_the_router_goes_on_when_the_kvstore_is_gone(
    kvstore: KvstoreProcess, router: RouterProcess
) -> None:
    async with (
        running_worker(FakeWorker("decode-0", SCRIPT)) as worker,
        httpx.AsyncClient(base_url=f"http://{router.address}", timeout=60) as http,
    ):
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503
        async with registered(worker, kvstore.address):
            await until_ready(http)
            first = await http.post("/v1/completions", json=ASK)
            assert first.status_code == 200
            assert first.headers["x-baton-decode-worker"] == "decode-0"
            assert "baton_router_kvstore_connected 1.0" in (await http.get(router.metrics_url)).text
            kvstore.kill()
            async with asyncio.timeout(60):
                while "baton_router_kvstore_connected 0.0" not in (await http.get(router.metrics_url)).text:
                    await asyncio.sleep(0.05)
            again = await http.post("/v1/completions", json=ASK)
            assert again.json()["choices"][0]["text"] == first.json()["choices"][0]["text"]
            assert (await http.get("/ready")).status_code == 200


async def test_a_worker_that_leaves_is_not_used_and_one_that_comes_is(
    kvstore: KvstoreProcess, router: RouterProcess
) -> None:
    async with httpx.AsyncClient(base_url=f"http://{router.address}", timeout=60) as http:
        for name in ("decode-0", "decode-1"):
            async with (
                running_worker(FakeWorker(name, SCRIPT)) as worker,
                registered(worker, kvstore.address),
            ):
                await until_ready(http)
                answer = await http.post("/v1/completions", json=ASK)
                assert answer.headers["x-baton-decode-worker"] == name
            async with asyncio.timeout(60):
                while (await http.get("/ready")).status_code == 200:
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_after_its_running_streams(
    kvstore: KvstoreProcess, router: RouterProcess, number: signal.Signals
) -> None:
    async with running_worker(FakeWorker("decode-0", SCRIPT)) as worker, registered(worker, kvstore.address):
        async with httpx.AsyncClient(base_url=f"http://{router.address}", timeout=60) as http:
            await until_ready(http)
            worker.hold_at = 2
            asking = asyncio.create_task(http.post("/v1/completions", json=ASK))
            await worker.wait_for("len(self.starts) == 1")
            stopping = asyncio.create_task(asyncio.to_thread(router.stop, number))
            await until(lambda: "stopping" in router.log, "the router is stopping")
            worker.go_on.set()
            assert (await asking).json()["usage"]["completion_tokens"] == 4
        assert await stopping == 0
        await worker.wait_for("self.sessions == 0")


def test_a_wrong_model_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.router", "--model", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "config.json" in ended.stderr


def test_a_taken_port_is_named(router: RouterProcess) -> None:
    ended = subprocess.run(router.command(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "--port" in ended.stderr


def test_the_process_never_imports_torch() -> None:
    code = "import sys, services.router.__main__; sys.exit('torch' in sys.modules or 'nixl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
