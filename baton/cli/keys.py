"""`baton keys`: make, list and revoke the API keys of a file that routers read (`--api-keys`)."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from baton.cli.tables import print_table
from baton.errors import BatonError
from baton.security.keys import new_key, read_keys, write_keys

_WEIGHT = click.FloatRange(0, 1e6, min_open=True)
_RATE = click.IntRange(0, 10**12)
_file = click.option(
    "--api-keys",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="BATON_API_KEYS",
    required=True,
    help="the file  [env BATON_API_KEYS]",
)


@click.group()
def keys() -> None:
    """Make, list and revoke API keys. Routers follow the file within a second."""


@keys.command(short_help="Make a key and print it.")
@_file
@click.option("--tenant", default="", help="whose requests they are [of no tenant]")
@click.option(
    "--weight", type=_WEIGHT, default=1.0, show_default=True, help="the tenant's share where tenants wait"
)
@click.option("--requests-per-minute", type=_RATE, default=0, help="at most, at each router [0: any number]")
@click.option(
    "--tokens-per-minute", type=_RATE, default=0, help="of prompts and answers, likewise [0: any number]"
)
def new(file: Path, tenant: str, weight: float, requests_per_minute: int, tokens_per_minute: int) -> None:
    """Make a key and print it: the file keeps its hash only, so it is shown this once."""
    secret, key = new_key(
        tenant=tenant,
        weight=weight,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    try:
        write_keys(file, [*(read_keys(file) if file.exists() else []), key])
    except BatonError as error:
        raise click.ClickException(error.message) from error
    click.echo(secret)


@keys.command("list")
@_file
def list_keys(file: Path) -> None:
    """Show every key's id, tenant and limits."""
    try:
        found = read_keys(file)
    except BatonError as error:
        raise click.ClickException(error.message) from error
    print_table(
        ("id", "tenant", "weight", "requests/min", "tokens/min", "created", "state"),
        [
            (
                key.id,
                key.tenant,
                f"{key.weight:g}",
                str(key.requests_per_minute or "any"),
                str(key.tokens_per_minute or "any"),
                key.created,
                "revoked" if key.revoked else "valid",
            )
            for key in found
        ],
    )


@keys.command()
@_file
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def revoke(file: Path, ids: tuple[str, ...]) -> None:
    """Let the keys with these IDs in no longer."""
    try:
        found = read_keys(file)
        if missing := set(ids) - {key.id for key in found}:
            raise click.ClickException(f"{file} has no key {', '.join(sorted(missing))}")
        write_keys(
            file, [msgspec.structs.replace(key, revoked=True) if key.id in ids else key for key in found]
        )
    except BatonError as error:
        raise click.ClickException(error.message) from error
