"""`baton doctor`: does this machine have what a cluster needs, and if not, what to do?"""

from __future__ import annotations

from collections.abc import Iterator

import click
from rich.console import Console
from rich.markup import escape

from baton.cli import checks
from baton.cli.checks import Finding, Verdict
from baton.cli.options import settings_options
from baton.config import Settings

_STYLES = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.FAIL: "bold red"}


@click.command(short_help="Check what a cluster needs on this machine.")
@settings_options("model", "router")
def doctor(settings: Settings) -> None:
    """Check what a cluster needs on this machine; every line that is not ok says what to do.

    Ends with status 1 when something required is missing or broken.
    """
    console = Console(highlight=False)
    failed = 0
    for finding in _findings(settings):
        style = _STYLES[finding.verdict]
        line = f"[{style}]{finding.verdict.value:<5}[/] {finding.subject:<14} {escape(finding.found)}"
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(f"{'':<21}→ {escape(finding.remedy)}", soft_wrap=True)
        failed += finding.verdict is Verdict.FAIL
    if failed:
        raise click.ClickException(f"{failed} of the checks failed; the lines above say what to do")


def _findings(settings: Settings) -> Iterator[Finding]:
    yield checks.python()
    yield checks.cores_and_memory()
    base = checks.base_install()
    if base is not None:
        yield base
    else:
        yield checks.torch_build()
        yield from checks.nixl()
    yield checks.shared_memory()
    yield checks.open_files()
    yield checks.locked_memory()
    yield checks.gpu(settings)
    yield checks.compiler()
    yield checks.port(settings.router.host, settings.router.port, "--port")
    yield checks.port(settings.router.host, settings.router.grpc_port, "--grpc-port")
    yield checks.model(settings)
