"""How processes log: one line per event on stderr, for people or for machines.

A line about a request begins with `request ID: ` and says nothing of its prompt, its output or its tokens.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
from datetime import UTC, datetime
from typing import Literal

import orjson

_OURS = ("baton", "services", "__main__")
_ABOUT_A_REQUEST = "request %s"

LogFormat = Literal["auto", "text", "json"]


def configure(process: str, level: str, log_format: LogFormat = "auto") -> None:
    """Send this process's log lines to stderr; call once, first thing in a main.

    Args:
        process: name in each line, such as `router` or a worker id.
        level: the `log_level` setting. Libraries log warnings and worse only: what they write at
            lower levels may hold request bodies.
        log_format: the setting of that name; auto is json where stderr is a pipe, which a program reads, as
            in a container, and text on a terminal or in a file.
    """
    as_json = log_format == "json" or (log_format == "auto" and _is_pipe(sys.stderr.fileno()))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if as_json else _text(process))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())


class JsonLines(logging.Formatter):
    """Each record as a JSON object: time, level, process, logger, message; request_id and error if any."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if str(record.msg).startswith(_ABOUT_A_REQUEST) and isinstance(record.args, tuple):
            line["request_id"] = str(record.args[0])
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def _text(process: str) -> logging.Formatter:
    line = f"%(asctime)s.%(msecs)03d %(levelname)-7s {process.replace('%', '%%')}: %(message)s"
    return logging.Formatter(line, datefmt="%Y-%m-%d %H:%M:%S")


def _is_pipe(file: int) -> bool:
    mode = os.fstat(file).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
