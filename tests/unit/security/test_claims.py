"""Does every line of the threat model name tests, and are they there?"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text()
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def claims() -> list[tuple[str, str]]:
    """Each claim under "What is defended", with the cell that names its tests."""
    defended = PAGE.partition("## What is defended")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in defended.splitlines() if line.startswith("| ")]
    return [(row[0].strip(), row[-1].strip()) for row in rows if row[0].strip() != "claim"]


@pytest.mark.parametrize(("claim", "tests"), claims(), ids=[claim[:60] for claim, _ in claims()])
def test_a_claim_names_tests_that_exist(claim: str, tests: str) -> None:
    named = _TEST.findall(tests)
    assert named, f"no test holds this: {claim}"
    assert tests.count("`") == 2 * len(named), f"not the name of a test: {tests}"
    for file, name in named:
        assert name in _functions(ROOT / file), f"{file} has no {name}"


def test_the_page_makes_claims() -> None:
    assert len(claims()) >= 30


def _functions(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
