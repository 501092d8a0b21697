"""`baton up`: a whole cluster on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from baton.cli.cluster import Cluster, plan_cluster
from baton.cli.options import effective_settings, settings_options
from baton.cli.run import WORKER_EXTRA, worker_extra_missing
from baton.cli.supervisor import StartFailed, SupervisedProcess, Supervisor
from baton.cli.tables import print_table
from baton.config import Settings
from baton.model_folder import has_chat_template
from baton.rpc.channels import use_internal_tls


@click.command()
@settings_options(
    *("model", "cluster", "router", "engine", "worker", "kvstore", "internal_tls", "observability"),
    without=("role", "worker_id", "worker_port", "kvstore", "metrics_port", "share_ports", "cores"),
)
def up(settings: Settings) -> None:
    """Start a cluster on this machine and stop it with Ctrl-C.

    Runs a kvstore and the asked-for routers and workers as processes of their own, prints where each
    is, and restarts what dies. Only the routers' two ports are fixed; the rest take free ones.
    """
    if worker_extra_missing():
        raise click.ClickException(WORKER_EXTRA)
    given = {row.name for row in effective_settings() if row.source != "default"}
    use_internal_tls(settings.internal_tls)
    cluster = plan_cluster(settings, given)
    logs = Path(tempfile.mkdtemp(prefix="baton-"))
    run = _Run(cluster, settings, logs)
    try:
        asyncio.run(run.until_stopped())
    finally:
        if run.supervisor.died_unexpectedly or settings.cluster.keep_logs:
            run.console.print(f"logs are kept in {logs}", soft_wrap=True)
        else:
            shutil.rmtree(logs, ignore_errors=True)


class _Run:
    """One cluster from its start to its end, and what the terminal shows of it."""

    def __init__(self, cluster: Cluster, settings: Settings, logs: Path) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.supervisor = Supervisor(
            cluster.processes,
            logs,
            stop_timeout_s=settings.cluster.stop_timeout_s,
            report=lambda text: self.console.print(text, markup=False, soft_wrap=True),
        )
        self._cluster = cluster
        self._api_keys = settings.router.api_keys
        self._start_timeout_s = settings.cluster.start_timeout_s
        self._stop = asyncio.Event()
        self._asked_to_stop_at: float | None = None

    async def until_stopped(self) -> None:
        """Start, show, wait for a signal, stop.

        Raises:
            StartFailed: the cluster did not come up; everything is stopped again.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(self.supervisor.keep_running()),
                    tasks.create_task(self._cluster.readiness.follow_registry()),
                    tasks.create_task(self._come_up()),
                ]
                await self._stop.wait()
                for task in background:
                    task.cancel()
        except* StartFailed as failures:
            raise _first(failures) from None
        finally:
            await self.supervisor.stop()

    async def _come_up(self) -> None:
        progress = _Progress(self.supervisor.processes)
        live = Live(progress, console=self.console, transient=True)
        with live if self.console.is_terminal else nullcontext():
            await self.supervisor.until_ready(self._start_timeout_s, progress.ready)
        self.supervisor.settled()
        print_table(
            ("process", "role", "address", "pid", "log"),
            [
                (
                    process.spec.name,
                    process.spec.role,
                    process.address or "",
                    str(process.pid),
                    str(process.log),
                )
                for process in self.supervisor.processes
            ],
        )
        click.echo("\n" + _example(self._cluster, self._api_keys))
        click.echo(f"\nReady in {progress.elapsed_s():.1f} s. Ctrl-C stops everything.")

    def _on_signal(self) -> None:
        # A second one, if not the same key press delivered twice (by make, say), means: now.
        now = time.monotonic()
        if self._asked_to_stop_at is not None and now - self._asked_to_stop_at > 0.5:
            self.supervisor.hurry()
        if self._asked_to_stop_at is None:
            self._asked_to_stop_at = now
            self.console.print("\nstopping")
        self._stop.set()


class _Progress:
    """What is ready and what is still starting, as the terminal shows it meanwhile."""

    def __init__(self, processes: Sequence[SupervisedProcess]) -> None:
        self._started = time.monotonic()
        self._ready_after_s: dict[str, float | None] = {process.spec.name: None for process in processes}

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def ready(self, process: SupervisedProcess) -> None:
        self._ready_after_s[process.spec.name] = self.elapsed_s()

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, after_s in self._ready_after_s.items():
            state = f"starting, {self.elapsed_s():.0f} s" if after_s is None else f"ready in {after_s:.1f} s"
            table.add_row(name, state, style="dim" if after_s is None else "green")
        return table


def _example(cluster: Cluster, api_keys: str) -> str:
    """A curl command that streams an answer from the cluster; `api_keys` is the setting."""
    body: dict[str, object] = {"model": cluster.model_name, "max_tokens": 64, "stream": True}
    if has_chat_template(cluster.folder):
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "What does a list do?"}]
    else:
        path = "/v1/completions"
        body["prompt"] = "A list is"
    key = '  -H "Authorization: Bearer $API_KEY" \\\n' if api_keys else ""
    return (
        f"curl -N {cluster.base_url}{path} \\\n{key}"
        f"  -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"
    )


def _first(group: BaseExceptionGroup[StartFailed]) -> StartFailed:
    """The first failure of a group of groups."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, StartFailed)
    return found
