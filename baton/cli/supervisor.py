"""How the processes of `baton up` are started, kept running and stopped without a trace."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from baton.errors import BatonError

_FIRST_RESTART_S = 0.5
_SLOWEST_RESTART_S = 15.0
_HEALTHY_AFTER_S = 5.0
"""For how long a process has to take work so that its death is no failure to start."""
_PROBE_EVERY_S = 0.1
_TAIL_LINES = 12


class StartFailed(BatonError):
    """A process ended, or was not ready in time, while the cluster was starting."""


Probe = Callable[[], Awaitable[str | None]]
"""Answers the address to show once a process takes work, None before."""


@dataclass(frozen=True)
class ProcessSpec:
    """One process to run.

    `module` is started as `python -m module arguments`. Processes stop in ascending `stop_stage`.
    """

    name: str
    role: str
    module: str
    arguments: tuple[str, ...]
    stop_stage: int
    ready: Probe
    environ: Mapping[str, str] = field(default_factory=dict)


class SupervisedProcess:
    """One process across its restarts, and its log file."""

    def __init__(self, spec: ProcessSpec, logs: Path) -> None:
        self.spec = spec
        self.log = logs / f"{spec.name}.log"
        self.log.touch()
        self.address: str | None = None
        self.ready_since_s: float | None = None
        self.running: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self.running.pid if self.running is not None else None

    @property
    def alive(self) -> bool:
        return self.running is not None and self.running.returncode is None

    async def wait(self) -> int:
        """Exit status of the running process, negative for a signal."""
        assert self.running is not None
        return await self.running.wait()

    async def spawn(self) -> None:
        """Start the process in a group of its own, its output appended to the log."""
        with self.log.open("ab") as log:
            self.running = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "baton.cli.child", str(os.getpid())),
                *(self.spec.module, *self.spec.arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.spec.environ},
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole process group; nothing happens when it is gone."""
        if self.running is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.running.pid, number)

    def last_lines(self) -> str:
        """The end of the log, for a message about a process that died."""
        with self.log.open(errors="replace") as log:
            return "".join(deque(log, maxlen=_TAIL_LINES)).rstrip()

    def reason(self) -> str:
        """The one sentence a process that refused to start left as its last error, or ""."""
        with self.log.open(errors="replace") as log:
            errors = [line for line in log if line.startswith("Error: ")]
        return errors[-1].removeprefix("Error: ").strip() if errors else ""


class Supervisor:
    """Owns the processes, from `keep_running` to `stop`, which must follow however the former ended.

    Before `settled()` the death of a process fails the start; after it the process is restarted, with a
    back-off that grows while it does not come to work for long.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        logs: Path,
        *,
        stop_timeout_s: float,
        report: Callable[[str], None],
    ) -> None:
        """`report` is told about deaths and restarts; `logs` is an existing folder for the log files."""
        self.processes = [SupervisedProcess(spec, logs) for spec in specs]
        self.died_unexpectedly = False
        self._stop_timeout_s = stop_timeout_s
        self._report = report
        self._settled = False

    async def keep_running(self) -> None:
        """Start every process at once and keep each running; returns only by cancellation.

        Raises:
            StartFailed: (in a group) a process ended before `settled` was called.
        """
        async with asyncio.TaskGroup() as keepers:
            for process in self.processes:
                keepers.create_task(self._keep(process), name=f"keep {process.spec.name}")

    async def until_ready(self, timeout_s: float, progress: Callable[[SupervisedProcess], None]) -> None:
        """Wait until every process is ready; `progress` is called as each becomes so.

        Raises:
            StartFailed: some are not ready after `timeout_s` seconds; names them and their logs.
        """
        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as probes:
                for process in self.processes:
                    probes.create_task(self._probe(process, progress))
        except TimeoutError:
            late = [process for process in self.processes if process.address is None]
            names = ", ".join(process.spec.name for process in late)
            self.died_unexpectedly = True
            raise StartFailed(
                f"not ready after {timeout_s:g} s (--start-timeout-s): {names}\n\n"
                + "\n\n".join(f"{process.log} ends with:\n{process.last_lines()}" for process in late)
            ) from None

    def settled(self) -> None:
        """The start succeeded: from now on processes that die are restarted."""
        self._settled = True

    def hurry(self) -> None:
        """Kill everything now instead of waiting for it to stop."""
        self._stop_timeout_s = 0.0
        for process in self.processes:
            if process.alive:
                process.signal(signal.SIGKILL)

    async def stop(self) -> None:
        """Stop every process, stage by stage; what has not ended within the time-out is killed."""
        ordered = sorted(self.processes, key=lambda process: process.spec.stop_stage)
        for _, stage in groupby(ordered, key=lambda process: process.spec.stop_stage):
            await self._stop_together(list(stage))

    async def _keep(self, process: SupervisedProcess) -> None:
        restarts = 0
        while True:
            status = await self._run_once(process)
            how = _exit_words(status)
            if not self._settled and (reason := process.reason()):
                raise StartFailed(f"{process.spec.name}: {reason}")
            self.died_unexpectedly = True
            if not self._settled:
                raise StartFailed(
                    f"{process.spec.name} ended while starting ({how}); {process.log} ends with:\n"
                    f"{process.last_lines()}"
                )
            served_s = time.monotonic() - process.ready_since_s if process.ready_since_s is not None else 0.0
            restarts = 0 if served_s > _HEALTHY_AFTER_S else restarts
            delay_s = min(_FIRST_RESTART_S * 2**restarts, _SLOWEST_RESTART_S)
            restarts += 1
            self._report(
                f"{process.spec.name} died ({how}); restarting it in {delay_s:g} s. "
                f"{process.log} ends with:\n{process.last_lines()}"
            )
            await asyncio.sleep(delay_s)

    async def _run_once(self, process: SupervisedProcess) -> int:
        process.address = process.ready_since_s = None
        await process.spawn()
        async with asyncio.TaskGroup() as tasks:
            probe = tasks.create_task(self._probe(process, self._announce)) if self._settled else None
            status = await process.wait()
            if probe is not None:
                probe.cancel()
        process.signal(signal.SIGKILL)  # what it may have started itself
        return status

    def _announce(self, process: SupervisedProcess) -> None:
        where = (process.address or "").replace("\n", ", ")
        self._report(f"{process.spec.name} is ready again: {where}, pid {process.pid}")

    async def _probe(self, process: SupervisedProcess, progress: Callable[[SupervisedProcess], None]) -> None:
        while process.address is None:
            process.address = await process.spec.ready()
            if process.address is None:
                await asyncio.sleep(_PROBE_EVERY_S)
        process.ready_since_s = time.monotonic()
        progress(process)

    async def _stop_together(self, stage: list[SupervisedProcess]) -> None:
        living = [process for process in stage if process.alive]
        for process in living:
            process.signal(signal.SIGTERM)
        exits = asyncio.gather(*(process.wait() for process in living))
        with suppress(TimeoutError):
            async with asyncio.timeout(self._stop_timeout_s):
                await asyncio.shield(exits)
        for process in living:
            process.signal(signal.SIGKILL)
        await exits


def _exit_words(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
