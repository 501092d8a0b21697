"""Which files may a flag name: one to read, or one to write?"""

from __future__ import annotations

import os
from pathlib import Path

import click

from baton.cli.options import Decorator

READ = click.Path(exists=True, dir_okay=False, path_type=Path)
"""A file that is there."""


def file_to_write(name: str, help: str) -> Decorator:
    """The option `name` for a file to write; that it can be is better known before the work than after it."""
    path = click.Path(dir_okay=False, writable=True, path_type=Path)
    return click.option(name, type=path, callback=_checked, help=help)


def _checked(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and not os.access(path.parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"there is no folder {str(path.parent)!r} to write to")
    return path
