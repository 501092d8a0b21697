"""What do clients notice when Redis is killed, slow or full, or the kvstore is killed, and for how long?

    python benchmarks/redis_faults.py [--quick]

`baton up` runs two workers and keeps its index in a Redis of its own, behind a proxy that can be slow.
Clients stream answers to prompts that share beginnings all the time, and compare each token with what the
same prompt gave before anything went wrong. Staleness is the largest that metrics showed: of the router's
index (`baton_index_lag_seconds`) and of what Redis has (`baton_kvstore_redis_lag_seconds`). Recovery is how
long it took until they were as before: after Redis was well again, or since the kvstore was killed. Figures
are the worst of all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from served import figure, print_report

from tests.redis_faults import Outcome, faulty_cluster


async def suffer(prompts: int, clients: int, rounds: int) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with faulty_cluster(Path(folder), prompts, clients) as cluster:
            for _ in range(rounds):
                for outcome in await cluster.outcomes():
                    found.setdefault(outcome.fault, []).append(outcome)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    quick = parser.parse_args().quick
    found = asyncio.run(suffer(prompts=24, clients=3, rounds=1 if quick else 5))
    table = Table(title="The worst of every round")
    for column in ("fault", "requests", "failed", "changed", "index stale", "Redis stale", "recovery"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    figures = []
    for fault, outcomes in found.items():
        requests, wrong = sum(one.requests for one in outcomes), sum(one.wrong for one in outcomes)
        failed = sum(len(one.failed) for one in outcomes)
        index_s = max(one.index_stale_s for one in outcomes)
        redis_s = max(one.redis_stale_s for one in outcomes)
        recovery_s = max(one.recovery_s for one in outcomes)
        seconds = (f"{value:.1f} s" for value in (index_s, redis_s, recovery_s))
        table.add_row(fault, str(requests), str(failed), str(wrong), *seconds)
        name = fault.lower().replace(",", "").replace(" ", "_")
        figures += [
            figure(f"{name}_requests", requests, "requests"),
            figure(f"{name}_failed_or_changed", failed + wrong, "requests", at_most=0),
            figure(f"{name}_index_stale", index_s, "s"),
            figure(f"{name}_redis_stale", redis_s, "s"),
            figure(f"{name}_recovery", recovery_s, "s"),
        ]
    Console(file=sys.stdout, width=110).print(table)
    print_report("redis_faults", figures)


if __name__ == "__main__":
    main()
