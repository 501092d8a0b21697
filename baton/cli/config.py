"""`baton config`: every setting's effective value and where it came from."""

from __future__ import annotations

import click
import orjson
from rich.console import Console
from rich.table import Table

from baton.cli.options import effective_settings, settings_options
from baton.config import SECTIONS, Settings, flag, variable


@click.command()
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
                "value": row.value,
                "source": row.source,
                "section": row.section,
                "flag": flag(row.name),
                "env": variable(row.name),
            }
            for row in rows
        }
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2))
        return
    table = Table(box=None, header_style="bold")
    for column in ("section", "setting", "value", "from"):
        table.add_column(column, no_wrap=column != "value", overflow="fold")
    section = ""
    for row in rows:
        source = row.source if row.source == "default" else f"[bold]{row.source}[/bold]"
        table.add_row(row.section if row.section != section else "", row.name, str(row.value), source)
        section = row.section
    Console().print(table)
