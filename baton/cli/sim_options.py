"""What `baton plan` and `baton simulate` have in common: the flags of the workers that are not there."""

from __future__ import annotations

import click

from baton.cli.load_options import POSITIVE
from baton.cli.options import together


def _power_of_two(_: click.Context, __: click.Parameter, value: int) -> int:
    if value & (value - 1):
        raise click.BadParameter(f"{value} is not a power of two")
    return value


worker_options = together(
    click.option(
        "--kv-bytes-per-token",
        type=click.IntRange(min=1),
        default=131_072,
        show_default=True,
        help="of keys and values, all layers",
    ),
    click.option(
        "--block-size",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        callback=_power_of_two,
        help="tokens",
    ),
    click.option(
        "--max-batch-tokens",
        type=click.IntRange(min=0),
        default=0,
        help="computed per step at most [0: as few as reach full prefill speed, as workers choose]",
    ),
    click.option("--max-batch-requests", type=click.IntRange(min=1), default=256, show_default=True),
    click.option(
        "--network-bytes-per-s",
        type=POSITIVE,
        default=12.5e9,
        show_default=True,
        help="of a worker's network card, each way",
    ),
)
"""What every worker of a simulated cluster has."""
