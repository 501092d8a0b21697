"""The decode worker process: `python -m services.decode`."""

from baton.worker.command import worker_command

if __name__ == "__main__":
    worker_command("decode")()
