"""Log lines: for machines an object each, with the request's id; for people, text."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

from baton.logs import JsonLines

LOG_TWICE = """
import logging
from baton.logs import configure
configure("router", "info")
logging.getLogger("baton.x").info("request %s: %s", "r-1", "placed anew")
logging.getLogger("baton.x").debug("too little to say")
"""


def line(message: str, *args: object) -> dict[str, object]:
    record = logging.LogRecord("baton.x", logging.WARNING, "file", 1, message, args, None)
    parsed: dict[str, object] = json.loads(JsonLines("decode-0").format(record))
    return parsed


def test_a_line_about_a_request_names_it() -> None:
    said = line("request %s: %s", "r-1", 'a "quoted" reason')
    assert said["request_id"] == "r-1"
    assert said["message"] == 'request r-1: a "quoted" reason'
    assert (said["level"], said["process"], said["logger"]) == ("warning", "decode-0", "baton.x")


def test_other_lines_name_none() -> None:
    assert "request_id" not in line("session with %s is up", "decode-0")


def test_an_exception_is_one_line() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "died", (), sys.exc_info())
    text = JsonLines("router").format(record)
    assert "\n" not in text
    assert "ValueError: bad" in json.loads(text)["error"]


def test_a_pipe_gets_json_and_a_file_text(tmp_path: Path) -> None:
    piped = subprocess.run([sys.executable, "-c", LOG_TWICE], capture_output=True, check=True)
    assert [json.loads(each)["request_id"] for each in piped.stderr.splitlines()] == ["r-1"]
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", LOG_TWICE], stderr=log, check=True)
    text = (tmp_path / "log").read_text()
    assert text.endswith("router: request r-1: placed anew\n")
    assert not text.startswith("{")
