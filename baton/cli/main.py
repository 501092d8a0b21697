"""The `baton` command: one subcommand per file."""

from __future__ import annotations

import click

from baton import __version__
from baton.cli.bench import bench
from baton.cli.chat import chat
from baton.cli.config import config
from baton.cli.doctor import doctor
from baton.cli.fetch import fetch
from baton.cli.keys import keys
from baton.cli.plan import plan
from baton.cli.profile import profile
from baton.cli.run import PROCESS_COMMANDS
from baton.cli.simulate import simulate_command
from baton.cli.top import top
from baton.cli.up import up


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="baton")
def main() -> None:
    """Serve large language models with prefill and decode on separate workers."""


COMMANDS = (
    *(up, chat, top, doctor, config, fetch, keys, plan, profile, bench, simulate_command),
    *PROCESS_COMMANDS,
)
for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
