"""`baton router`, `baton prefill`, ...: one process of a cluster in the foreground."""

from __future__ import annotations

import importlib.util
import os
import sys

import click

WORKER_EXTRA = "workers need torch and NIXL: pip install 'baton-serve[worker]'"


def worker_extra_missing() -> bool:
    """Whether this is the base install, which can run routers and kvstores only."""
    return any(importlib.util.find_spec(name) is None for name in ("torch", "nixl", "safetensors"))


def _process_command(name: str, module: str, summary: str, *fixed: str, needs_torch: bool) -> click.Command:
    """A command that becomes `python -m module`, which takes all flags, --help included."""

    @click.command(
        name,
        help=f"{summary} Flags: `baton {name} --help`.",
        short_help=summary,
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        if needs_torch and worker_extra_missing():
            raise click.ClickException(WORKER_EXTRA)
        # exec, so that signals and the exit status are the process's own.
        os.execv(sys.executable, [sys.executable, "-m", module, *fixed, *arguments])

    return run


PROCESS_COMMANDS = (
    _process_command("kvstore", "services.kvstore", "Run a prefix index and registry.", needs_torch=False),
    _process_command("router", "services.router", "Run a router.", needs_torch=False),
    _process_command(
        "planner", "services.planner", "Keep the number of workers and their roles right.", needs_torch=False
    ),
    _process_command("prefill", "services.prefill", "Run a prefill worker.", needs_torch=True),
    _process_command("decode", "services.decode", "Run a decode worker.", needs_torch=True),
    _process_command(
        "worker", "services.decode", "Run a hybrid worker.", "--role", "hybrid", needs_torch=True
    ),
)
