"""The command line of a worker process."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Literal

import click

from baton import tracing
from baton.cli.options import effective_settings, settings_options
from baton.config import PROCESS_SECTIONS, BadSetting, Settings
from baton.logs import configure
from baton.machine import read_cores
from baton.rpc.channels import use_internal_tls


def worker_command(role: Literal["prefill", "decode"]) -> click.Command:
    """The main of a worker that starts in `role` unless --role or its variable says otherwise."""

    @click.command(help=f"Serve a worker that starts in role {role} unless --role says otherwise.")
    @settings_options(*PROCESS_SECTIONS[role])
    def main(settings: Settings) -> None:
        # Here, not above: --help and what is wrong with a flag need not wait for torch.
        from baton.worker.host import run_worker

        if any(item.name == "role" and item.source == "default" for item in effective_settings()):
            settings = replace(settings, worker=replace(settings.worker, role=role))
        name, said = settings.worker.worker_id or settings.worker.role, settings.observability
        configure(name, said.log_level, said.log_format)
        tracing.configure(name, said)
        use_internal_tls(settings.internal_tls)
        _bind(settings.engine.cores)  # before any thread starts: each inherits it
        asyncio.run(run_worker(settings))

    return main


def _bind(cores: str) -> None:
    if not cores:
        return
    try:
        os.sched_setaffinity(0, read_cores(cores))
    except (ValueError, OSError, AttributeError) as error:
        raise BadSetting(f"--cores {cores}: no such cores to be had here ({error})", field="cores") from error
