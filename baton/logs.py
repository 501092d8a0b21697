"""How processes log: one text line per event on stderr, with time, level and process.

Log what happened to a request by its id; never its prompt, its output or its token ids.
"""

from __future__ import annotations

import logging
import sys

_OURS = ("baton", "services", "__main__")


def configure(process: str, level: str) -> None:
    """Send this process's log lines to stderr; call once, first thing in a main.

    Args:
        process: name at the head of each line, such as `router` or a worker id.
        level: the `log_level` setting. Libraries log warnings and worse only: what they write at
            lower levels may hold request bodies.
    """
    line = f"%(asctime)s.%(msecs)03d %(levelname)-7s {process.replace('%', '%%')}: %(message)s"
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format=line, datefmt="%Y-%m-%d %H:%M:%S", force=True
    )
    logging.captureWarnings(True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
