"""A prefill worker whose pool is not registered with NIXL: everything works but reading from it."""

from baton.transfer.agent import Agent
from baton.worker.command import worker_command

if __name__ == "__main__":
    Agent.register = lambda *_: None  # type: ignore[method-assign]
    worker_command("prefill")()
