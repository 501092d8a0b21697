"""The prefill worker process: `python -m services.prefill`."""

from baton.worker.command import worker_command

if __name__ == "__main__":
    worker_command("prefill")()
