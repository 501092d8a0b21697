"""Does baton run on a real Ray cluster, and go on when replicas are killed?"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml

from deploy.ray.scaling import KV_USAGE, QUEUED_TOKENS, by_queue
from tests.cluster import ROOT

_START_S = 240.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the OpenAI API of an application with two workers of each role, on a Ray cluster of its own."""
    folder = tmp_path_factory.mktemp("ray")
    port, http_port = _ephemeral_port(), _ephemeral_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": http_port},
        "applications": [
            {
                "name": "baton",
                "import_path": "deploy.ray.app:app",
                "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
                "args": {"prefill": 2, "decode": 2, "worker": {"kv_bytes": 64 << 20, "threads": 1}},
            }
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    # Ray's sockets are below this folder, and such a path may have 107 characters.
    scratch = Path("/tmp") / f"ray-{port}"
    head = ("start", "--head", "--block", "--port", str(port), "--num-cpus", "16", "--temp-dir", str(scratch))
    head += ("--include-dashboard", "false", "--object-store-memory", str(80 << 20), "--disable-usage-stats")
    serve = ("run", str(folder / "config.yaml"), "--app-dir", str(ROOT), "--address", f"127.0.0.1:{port}")
    try:
        with _running("ray", head, folder) as ray_log:
            _until(lambda: "Ray runtime started" in ray_log.read_text(), "Ray did not start")
            with _running("serve", serve, folder) as serve_log:
                url = f"http://127.0.0.1:{http_port}/v1"
                _until(lambda: _serves(url), f"the application did not start, see {serve_log}")
                yield url
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _ephemeral_port() -> int:
    """Above those that Ray gives to its own workers, 10002 to 19999."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _serves(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models").status_code == 200
    except httpx.HTTPError:
        return False


_TOKEN = secrets.token_hex(16)


@contextmanager
def _running(program: str, arguments: Sequence[str], folder: Path) -> Iterator[Path]:
    """A program of Ray's, until the block ends, with all that it started; gives its log."""
    log = folder / f"{program}.log"
    environ = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = psutil.Popen(
            [str(Path(sys.executable).parent / program), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
        )
    try:
        yield log
    finally:
        children = process.children(recursive=True)
        process.send_signal(signal.SIGINT if program == "serve" else signal.SIGTERM)
        for left in psutil.wait_procs([process, *children], timeout=60)[1]:
            left.kill()


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline_s = time.monotonic() + _START_S
    while not condition():
        assert time.monotonic() < deadline_s, otherwise
        time.sleep(0.2)


def workers(role: str) -> dict[int, int]:
    """Process ids of the application's workers, with those of the replicas that started them."""
    found = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or []
        if "services.decode" in words and words[words.index("--role") + 1] == role:
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(process.info["ppid"]).name().startswith("ray::"):
                    found[process.pid] = process.info["ppid"]
    return found


def test_the_openai_client_gets_answers_whole_and_in_pieces(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        asked = {"model": model, "prompt": "A list is", "max_tokens": 24, "temperature": 0.0}
        whole = client.completions.create(**asked).choices[0]
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
        assert whole.text == "".join(pieces)
        assert len(pieces) > 1
        message = {"role": "user", "content": "What is a list?"}
        chat = client.chat.completions.create(model=model, messages=[message], max_tokens=8)
        assert chat.usage.completion_tokens > 0
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**{**asked, "model": "another"})


def test_killed_replicas_lose_no_request_and_come_back(url: str) -> None:
    before = {role: workers(role) for role in ("prefill", "decode")}
    assert [len(found) for found in before.values()] == [2, 2]

    async def load() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            model = (await client.models.list()).data[0].id
            prompts = [f"{number} " + "def f(x): return x " * 20 for number in range(12)]
            async with asyncio.TaskGroup() as tasks:
                asked = [
                    tasks.create_task(client.completions.create(model=model, prompt=prompt, max_tokens=60))
                    for prompt in prompts
                ]
                while not any(task.done() for task in asked):
                    await asyncio.sleep(0.05)
                for found in before.values():
                    psutil.Process(next(iter(found.values()))).kill()
            return [task.result().choices[0].finish_reason for task in asked]

    ends = asyncio.run(load())
    assert len(ends) == 12
    assert set(ends) <= {"length", "stop"}
    for role, found in before.items():
        killed = next(iter(found))
        _until(lambda: len(workers(role).keys() - {killed}) == 2, f"{role} did not come back")  # noqa: B023


class Context:
    """What Serve shows a policy."""

    def __init__(self, name: str, target: int, metrics: dict[str, dict[str, float]]) -> None:
        self.deployment_name = name
        self.target_num_replicas = target
        self.aggregated_metrics = metrics


@pytest.mark.parametrize(
    ("context", "replicas"),
    [
        (Context("prefill", 1, {"queued_tokens": {"a": 2.5 * QUEUED_TOKENS, "b": 0.0}}), 3),
        (Context("decode", 2, {"kv_usage": {"a": KV_USAGE, "b": KV_USAGE / 2}}), 2),
        (Context("decode", 4, {"kv_usage": {"a": 0.0}}), 1),
        (Context("decode", 4, {}), 4),
    ],
)
def test_replicas_follow_what_workers_report(context: Context, replicas: int) -> None:
    assert by_queue(context)[0] == replicas  # type: ignore[arg-type]
