"""How long fuzz tests look for trouble: a moment in every test run, as long as asked by `make fuzz`."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
"""How long all fuzz tests together go on; 0: one round of each."""

_EXAMPLES = 60
targets: list[str] = []
"""Every test that shares `SECONDS`."""


def explore(
    *, examples: int = _EXAMPLES, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Make a test of what must hold for all values of the strategies.

    Without `SECONDS` the examples are the same in every run; with it, rounds of others follow until the
    test's share of the time is over.
    """

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        targets.append(check.__name__)

        def run() -> None:
            ends_s = time.monotonic() + SECONDS / len(targets)
            first = random.SystemRandom().getrandbits(32) if SECONDS else 0
            for number in range(first, first + 2**32):
                one_round(check, number, examples, strategies)
                if time.monotonic() >= ends_s:
                    return

        run.__name__, run.__doc__, run.__module__ = check.__name__, check.__doc__, check.__module__
        return run

    return decorate


def one_round(
    check: Callable[..., None], number: int, examples: int, strategies: dict[str, st.SearchStrategy[Any]]
) -> None:
    """Try `examples` values, drawn by `number`; shrink and report what fails."""
    tried = settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    tried(seed(number)(given(**strategies)(check)))()
