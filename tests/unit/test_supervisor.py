"""Are a cluster's processes started together, kept running, and stopped in order without a trace?"""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from baton.cli.supervisor import ProcessSpec, StartFailed, SupervisedProcess, Supervisor
from tests.waiting import until

# Touches NAME.up, then waits for SIGTERM, which appends NAME to the file `stopped`.
POLITE = """
    import os, signal, sys
    from pathlib import Path
    name = sys.argv[1]
    def stop(*_):
        with open("stopped", "a") as file:
            file.write(name + "\\n")
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    print(name, "runs as", os.getpid(), flush=True)
    Path(name + ".up").write_text(str(os.getpid()))
    while True:
        signal.pause()
"""
STUBBORN = """
    import signal, sys
    from pathlib import Path
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(sys.argv[1] + ".up").touch()
    while True:
        signal.pause()
"""
REFUSES = """
    import sys
    sys.exit("Error: --kv-blocks 3 is too few")
"""
CRASHES = """
    raise ZeroDivisionError("on purpose")
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules to start instead of services; it is also their working directory."""
    for name, source in {
        "polite": POLITE,
        "stubborn": STUBBORN,
        "refuses": REFUSES,
        "crashes": CRASHES,
    }.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(module: str, name: str, stage: int = 0) -> ProcessSpec:
    async def ready() -> str | None:
        return "here" if Path(f"{name}.up").exists() else None

    return ProcessSpec(
        name=name,
        role="test",
        module=module,
        arguments=(name,),
        stop_stage=stage,
        ready=ready,
        environ={"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )


@asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Run the supervisor and wait until all is ready; yields what stops it early."""
    keeper = asyncio.create_task(supervisor.keep_running())

    async def stop() -> None:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await supervisor.stop()

    try:
        await supervisor.until_ready(20, lambda process: None)
        supervisor.settled()
        yield stop
    finally:
        await stop()


def supervise(folder: Path, *specs: ProcessSpec, stop_timeout_s: float = 20) -> tuple[Supervisor, list[str]]:
    said: list[str] = []
    return Supervisor(specs, folder, stop_timeout_s=stop_timeout_s, report=said.append), said


async def test_processes_stop_stage_by_stage(stand_ins: Path) -> None:
    supervisor, said = supervise(
        stand_ins, spec("polite", "kvstore", 2), spec("polite", "router", 0), spec("polite", "worker", 1)
    )
    async with running(supervisor):
        pids = [process.pid for process in supervisor.processes]
        assert all(pid is not None and psutil.pid_exists(pid) for pid in pids)
    assert (stand_ins / "stopped").read_text().split() == ["router", "worker", "kvstore"]
    assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)
    assert said == []
    assert not supervisor.died_unexpectedly


async def test_a_process_that_ignores_the_signal_is_killed(stand_ins: Path) -> None:
    supervisor, _ = supervise(stand_ins, spec("stubborn", "worker"), stop_timeout_s=0.2)
    async with running(supervisor) as stop:
        await stop()
        assert supervisor.processes[0].running is not None
        assert supervisor.processes[0].running.returncode == -signal.SIGKILL


async def test_hurry_kills_what_is_still_stopping(stand_ins: Path) -> None:
    supervisor, _ = supervise(stand_ins, spec("stubborn", "worker"), stop_timeout_s=600)
    async with running(supervisor) as stop:
        stopping = asyncio.create_task(stop())
        await asyncio.sleep(0)
        supervisor.hurry()
        async with asyncio.timeout(60):
            await stopping


async def start_failure(supervisor: Supervisor) -> StartFailed:
    try:
        async with asyncio.timeout(60):
            await supervisor.keep_running()
    except* StartFailed as failures:
        (failure,) = failures.exceptions
    finally:
        await supervisor.stop()
    assert isinstance(failure, StartFailed)
    return failure


async def test_a_refusal_to_start_is_repeated_in_one_sentence(stand_ins: Path) -> None:
    supervisor, _ = supervise(stand_ins, spec("refuses", "decode-0"), spec("polite", "router"))
    failure = await start_failure(supervisor)
    assert failure.message == "decode-0: --kv-blocks 3 is too few"
    assert not supervisor.died_unexpectedly
    assert not any(process.alive for process in supervisor.processes)


async def test_a_crash_at_start_shows_the_end_of_its_log(stand_ins: Path) -> None:
    supervisor, _ = supervise(stand_ins, spec("crashes", "decode-0"))
    failure = await start_failure(supervisor)
    assert "decode-0 ended while starting (exit status 1)" in failure.message
    assert "ZeroDivisionError: on purpose" in failure.message
    assert supervisor.died_unexpectedly


async def test_a_process_that_never_gets_ready_is_named(stand_ins: Path) -> None:
    supervisor, _ = supervise(stand_ins, spec("polite", "router"))
    ready: list[SupervisedProcess] = []
    with pytest.raises(StartFailed, match="router") as caught:
        await supervisor.until_ready(0.05, ready.append)
    assert "--start-timeout-s" in caught.value.message
    assert ready == []


async def test_a_process_that_dies_later_is_restarted(stand_ins: Path) -> None:
    supervisor, said = supervise(stand_ins, spec("polite", "worker"))
    async with running(supervisor):
        (worker,) = supervisor.processes
        first = worker.pid
        assert first is not None
        (stand_ins / "worker.up").unlink()
        os.kill(first, signal.SIGKILL)
        await until(lambda: any("ready again" in text for text in said))
        assert worker.pid != first
        assert "worker died (killed by SIGKILL)" in said[0]
        assert f"runs as {first}" in said[0], "the end of its log is shown"
    assert supervisor.died_unexpectedly


def came_back(said: list[str], times: int) -> bool:
    return sum("ready again" in text for text in said) == times


@pytest.mark.parametrize(
    ("healthy_after_s", "pauses"),
    [(0.0, ["0.5 s", "0.5 s", "0.5 s"]), (600.0, ["0.5 s", "1 s", "2 s"])],
    ids=["it had worked", "it had hardly begun"],
)
async def test_only_what_does_not_come_to_work_is_restarted_ever_more_slowly(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, healthy_after_s: float, pauses: list[str]
) -> None:
    monkeypatch.setattr("baton.cli.supervisor._HEALTHY_AFTER_S", healthy_after_s)
    supervisor, said = supervise(stand_ins, spec("polite", "worker"))
    async with running(supervisor):
        (worker,) = supervisor.processes
        for times in range(1, 4):
            assert worker.pid is not None
            (stand_ins / "worker.up").unlink()
            os.kill(worker.pid, signal.SIGKILL)
            await until(partial(came_back, said, times))
    told = [text for text in said if "restarting it in" in text]
    assert [text.partition("restarting it in ")[2].partition(". ")[0] for text in told] == pauses


async def test_nothing_outlives_a_killed_parent(stand_ins: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys, time\n"
            "command = [sys.executable, '-m', 'baton.cli.child', str(os.getpid()), 'polite', 'orphan']\n"
            "subprocess.Popen(command, start_new_session=True)\n"
            "time.sleep(600)\n",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(stand_ins), *sys.path])},
    )
    try:
        up = stand_ins / "orphan.up"
        await until(lambda: up.exists() and up.read_text() != "")
        child = int(up.read_text())
    finally:
        parent.kill()
        parent.wait()
    await until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")
