"""Is what the chart renders what was reviewed? After a change that is meant: `make chart-golden`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.charts.rendering import EVERYTHING, PLANNER, text

GOLDEN = Path(__file__).parent / "golden"
RENDERS = {"kind": ("values-kind.yaml", ()), "everything": (None, EVERYTHING), "planner": (None, PLANNER)}


@pytest.mark.parametrize("name", RENDERS)
def test_renders_as_reviewed(name: str) -> None:
    file = GOLDEN / f"{name}.yaml"
    rendered = text(*RENDERS[name])
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(rendered)
    assert rendered == file.read_text(), "if this is meant: `make chart-golden`, and look at the diff"
