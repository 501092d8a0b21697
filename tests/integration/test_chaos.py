"""A short soak: what fails at random under load costs no answer, no token and no block. See `make chaos`."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.soak import soak


async def test_nothing_is_wrong_lost_or_leaked_when_everything_fails_at_random(tmp_path: Path) -> None:
    report = await soak(
        tmp_path,
        seconds=20.0,
        seed=7,
        clients=6,
        questions=24,
        pause_s=1.5,
        cluster_flags=("--routers", "2", "--prefill", "1", "--decode", "2"),
    )
    tally = report.tally
    assert (tally.wrong, tally.lost, report.leaked, report.crashes) == ([], [], {}, [])
    assert len(report.faults) >= 5
    assert tally.answered >= 24
