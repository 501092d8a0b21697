"""How commands get their flags: one click option per setting of baton/config.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import Field
from typing import Any, Literal, get_args, get_origin

import click

from baton.config import BadSetting, Effective, declared, flag, resolve, variable
from baton.errors import BatonError

Decorator = Callable[[Callable[..., None]], Callable[..., None]]
"""What gives a command its options."""

_EFFECTIVE = "baton.effective"
_NUMBERS: dict[Any, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT}


def settings_options(*sections: str, without: Collection[str] = ()) -> Decorator:
    """Give a click command a flag for every setting in `sections` of the settings tree but `without`.

    The command gets the whole tree, settled, as its keyword argument `settings`::

        @click.command()
        @settings_options(*PROCESS_SECTIONS["router"])
        def main(settings: Settings) -> None: ...

    A bad value ends the command with a usage error that names the flag or variable (status 2); any
    other `BatonError` that leaves the command ends it with its message alone (status 1).
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        offered = [(item, kind) for _, item, kind in declared(sections) if item.name not in without]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            given = {item.name: arguments.pop(item.name) for item, _ in offered}
            try:
                settings, effective = resolve(given)
                click.get_current_context().meta[_EFFECTIVE] = effective
                command(settings=settings, **arguments)
            except BadSetting as error:
                raise click.UsageError(error.message) from error
            except BatonError as error:
                raise click.ClickException(error.message) from error

        decorated: Callable[..., None] = run
        for item, kind in reversed(offered):
            decorated = _option(item, kind)(decorated)
        return decorated

    return decorate


def together(*options: Decorator) -> Decorator:
    """One decorator that gives a command all these options, listed in this order by --help."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def effective_settings() -> list[Effective]:
    """Every setting of the running command with where its value came from."""
    found: list[Effective] = click.get_current_context().meta[_EFFECTIVE]
    return found


def _option(item: Field[Any], kind: Any) -> Decorator:
    # The default stays None, so that a flag not given leaves the environment's value alone.
    shown = "nothing" if item.default in ("", None) else item.default
    text = f"{item.metadata['help']}  [env {variable(item.name)}; default {shown}]"
    if kind is bool:
        negative = "--no-" + flag(item.name).removeprefix("--")
        return click.option(f"{flag(item.name)}/{negative}", item.name, default=None, help=text)
    choices = click.Choice(get_args(kind)) if get_origin(kind) is Literal else None
    return click.option(
        flag(item.name), item.name, type=choices or _NUMBERS.get(kind, click.STRING), help=text
    )
