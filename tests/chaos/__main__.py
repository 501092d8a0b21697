"""`python -m tests.chaos`: run the soak and say what was seen; exit status 1 when anything went wrong."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.soak import Report, soak

_SHOWN = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="for how long faults begin")
    parser.add_argument("--seed", type=int, default=1, help="of the questions and of the faults")
    parser.add_argument("--clients", type=int, default=10, help="requests in flight")
    parser.add_argument("--questions", type=int, default=60, help="distinct requests")
    parser.add_argument("--pause", type=float, default=0.8, help="mean seconds between two faults")
    parser.add_argument("--keep-logs", action="store_true", help="also when nothing went wrong")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing of the clusters is to stay behind
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    console = Console(width=110, highlight=False, markup=False, soft_wrap=True)
    try:
        report = asyncio.run(
            soak(
                folder,
                seconds=given.seconds,
                seed=given.seed,
                clients=given.clients,
                questions=given.questions,
                pause_s=given.pause,
            )
        )
    except BaseException:
        console.print(f"logs are in {folder}")
        raise
    _print(console, report, given.seed)
    if _clean(report) and not given.keep_logs:
        shutil.rmtree(folder)
    else:
        console.print(f"logs are in {folder}")
    if not _clean(report):
        sys.exit(1)


def _print(console: Console, report: Report, seed: int) -> None:
    tally = report.tally
    for title, sentences in (("wrong", tally.wrong), ("lost", tally.lost), ("crashed", report.crashes)):
        for sentence in sentences[:_SHOWN]:
            console.print(f"{title}: {sentence}")
    if tally.slowest is not None:
        console.print(f"slowest: {tally.slowest}")
        silent_from_s, silent_until_s = tally.slowest.silence
        for fault in report.faults:
            if fault.began_s < silent_until_s and fault.ended_s > silent_from_s:
                since_s = fault.began_s - tally.slowest.began_s
                console.print(
                    f"  meanwhile: {fault.name} {fault.victim} from {since_s:.1f} s on "
                    f"for {fault.ended_s - fault.began_s:.1f} s"
                )
    counted = Counter(fault.kind for fault in report.faults)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(counted.items()))
    ways = ", ".join(f"{count} {way}" for way, count in sorted(tally.ways.items()))
    table = Table(title=f"Chaos with seed {seed}", show_header=False)
    table.add_column()
    table.add_column()
    for row in (
        ("faults injected", f"{len(report.faults)} ({kinds})"),
        ("requests answered", f"{tally.answered} (prefill over HTTP: {ways})"),
        ("slowest request", f"{tally.slowest.seconds if tally.slowest else 0.0:.1f} s"),
        ("tokens checked", str(tally.tokens)),
        ("refused (429) and asked again", str(tally.refused)),
        ("ended with their router and asked again", str(tally.ended_by_router)),
        ("blamed for two deaths and asked again", str(tally.blamed)),
        ("crashes that were no fault of ours", str(len(report.crashes))),
        ("wrong", str(len(tally.wrong))),
        ("lost", str(len(tally.lost))),
        ("leaked blocks", f"{sum(report.leaked.values())} {report.leaked or ''}"),
    ):
        table.add_row(*row)
    console.print(table)


def _clean(report: Report) -> bool:
    return not (report.tally.wrong or report.tally.lost or report.leaked or report.crashes)


if __name__ == "__main__":
    main()
