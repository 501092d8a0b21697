"""Does a starting worker say where its time goes, to terminals and to logs?"""

from __future__ import annotations

import io
import logging
import time

import pytest
from rich.console import Console

from baton.worker import startup
from baton.worker.startup import Startup


class Clock:
    """A `time` that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(startup, "time", clock)
    return clock


def test_parts_are_timed_and_long_ones_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    starting = Startup(Console(file=written))
    with caplog.at_level(logging.INFO):
        with starting.part("weights") as report:
            clock.now += 2.04
            report(3, 16)
        with starting.part("step times"):
            clock.now += 0.5
    assert starting.summary().endswith(", weights 2.0, step times 0.5")
    assert caplog.messages == ["weights took 2.0 s"]
    assert written.getvalue().strip() == "", "what is no terminal gets no bar"


def test_a_terminal_shows_how_far_it_is(clock: Clock) -> None:
    written = io.StringIO()
    with Startup(Console(file=written, force_terminal=True, width=80)).part("weights") as report:
        report(3, 16)
    assert "weights" in written.getvalue()
    assert "3/16" in written.getvalue()
