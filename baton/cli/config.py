"""`baton config`: every setting's effective value and where it came from."""

from __future__ import annotations

import re

import click
import orjson

from baton.cli.options import effective_settings, settings_options
from baton.cli.tables import print_table
from baton.config import SECTIONS, Settings, flag, variable


@click.command(short_help="Print every setting and where it came from.")
@settings_options(*SECTIONS)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def config(settings: Settings, as_json: bool) -> None:
    """Print the effective value of every setting and where it came from.

    Takes every flag there is, so that a command line can be tried before it is used.
    """
    rows = effective_settings()
    if as_json:
        found = {
            row.name: {
                "value": _shown(row.value),
                "source": row.source,
                "section": row.section,
                "flag": flag(row.name),
                "env": variable(row.name),
            }
            for row in rows
        }
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2))
        return
    print_table(
        ("section", "setting", "value", "from"),
        [(row.section, row.name, str(_shown(row.value)), row.source) for row in rows],
    )


def _shown(value: object) -> object:
    """The value, without the password where it is a URL that has one."""
    if not isinstance(value, str) or "@" not in value:
        return value
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", value)
