"""What happens at 20 times the load that a cluster sustains: goodput, memory, refusals, recovery.

    python benchmarks/overload.py [--quick] [--factor 20] [--tokens 512 128]

`baton up` runs a prefill and a decode worker with the bundled model. Clients stream answers, open loop: what
becomes of a request does not hold up the next one. An answer is good when its first token came within
--slo seconds of its request. First the load is found that the cluster sustains: with many requests in flight,
then, at rates around what that gave, the most good answers per second. Then comes the overload, and at its
end requests one by one, until one is as fast as nine in ten were at the lowest of those rates.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import psutil
from rich.console import Console
from rich.table import Table
from served import figure, print_report, random_tokens

from tests.cluster import Cluster, run_cluster

IN_FLIGHT, ROUNDS = 32, 3
KV_BLOCKS = 4096
RATES = (0.7, 0.9, 1.1)
SAMPLE_S = 0.5
PROBE_EVERY_S = 0.5
RECOVERY_S = 10.0
SUSTAINED_S = 60.0
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Ended:
    """How one request ended: the status, 0 where the connection broke; when it was sent and had its first and
    last token, in seconds of the monotonic clock."""

    status: int
    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    retry_after: bool = False
    whole: bool = False

    def good(self, slo_s: float) -> bool:
        return self.whole and self.first_s - self.sent_s <= slo_s


@dataclass
class Phase:
    """What was offered at one rate, and what came of it."""

    rate_per_s: float
    began_s: float
    seconds: float
    ended: list[Ended] = field(default_factory=list)

    def goodput_per_s(self, slo_s: float) -> float:
        """Good answers per second that ended while the load was on, its first fifth left out."""
        warm_s = self.began_s + self.seconds / 5
        until_s = self.began_s + self.seconds
        good = [one for one in self.ended if one.good(slo_s) and warm_s <= one.last_s <= until_s]
        return len(good) / (until_s - warm_s)

    def slowest_tenth_s(self) -> float:
        """Seconds to the first token that one answer in ten takes longer than."""
        times_s = sorted(one.first_s - one.sent_s for one in self.ended if one.whole)
        return times_s[len(times_s) * 9 // 10]

    def statuses(self) -> Counter[int]:
        return Counter(one.status for one in self.ended)


class Load:
    """Asks over connections that are kept, each with one request at a time; opens what it needs."""

    def __init__(self, base_url: str, prompt_tokens: int, answer_tokens: int) -> None:
        self._host, _, port = base_url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._draw = random.Random(7)
        self._prompt_tokens = prompt_tokens
        self._answer_tokens = answer_tokens

    async def one(self) -> Ended:
        """Ask once."""
        asked = {
            "prompt": random_tokens(self._prompt_tokens, self._draw),
            "max_tokens": self._answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        body = orjson.dumps(asked)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        sent_s = time.monotonic()
        connection = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                connection = self._free.pop() if self._free else await self._connect()
                reader, writer = connection
                writer.write(head + body)
                ended = await self._answer(reader, sent_s)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            if connection is not None:
                connection[1].close()
            return Ended(0, sent_s)
        self._free.append(connection)
        return ended

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port)

    async def _answer(self, reader: asyncio.StreamReader, sent_s: float) -> Ended:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ", 2)[1])
        if status != 200:
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            return Ended(status, sent_s, retry_after=b"\r\nretry-after:" in head)
        first_s, done = 0.0, False
        while size := int(await reader.readline(), 16):
            chunk = await reader.readexactly(size + 2)
            first_s = first_s or time.monotonic()
            done = done or b"data: [DONE]" in chunk
        await reader.readline()
        return Ended(status, sent_s, first_s, time.monotonic(), whole=done)


async def sustained(load: Load) -> float:
    """Answers per second to `IN_FLIGHT` clients that ask again when refused, after the first answers."""
    times_s: list[float] = []
    deadline_s = time.monotonic() + SUSTAINED_S

    async def keep_asking() -> None:
        while len(times_s) < ROUNDS * IN_FLIGHT and time.monotonic() < deadline_s:
            ended = await load.one()
            if ended.whole:
                times_s.append(ended.last_s)
            else:
                await asyncio.sleep(PROBE_EVERY_S)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(keep_asking())
    steady_s = times_s[len(times_s) // ROUNDS : ROUNDS * IN_FLIGHT]
    return (len(steady_s) - 1) / (steady_s[-1] - steady_s[0])


async def offer(load: Load, rate_per_s: float, seconds: float) -> Phase:
    """Send requests at random times, so many per second, and wait for the last of them."""
    draw = random.Random(11)
    phase = Phase(rate_per_s, time.monotonic(), seconds)

    async def one() -> None:
        phase.ended.append(await load.one())

    async with asyncio.TaskGroup() as tasks:
        due_s = phase.began_s
        while due_s < phase.began_s + seconds:
            if (left_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            tasks.create_task(one())
            due_s += draw.expovariate(rate_per_s)
    return phase


async def recovery_s(load: Load, ended_s: float, usual_s: float) -> float | None:
    """From the end of the load until a request was sent whose first token took no longer than `usual_s`;
    None: none was."""
    probes: list[asyncio.Task[Ended]] = []

    def recovered() -> list[float]:
        ended = (probe.result() for probe in probes if probe.done())
        return [one.sent_s for one in ended if one.whole and one.first_s - one.sent_s <= usual_s]

    async with asyncio.TaskGroup() as tasks:
        while not recovered() and time.monotonic() < ended_s + RECOVERY_S:
            probes.append(tasks.create_task(load.one()))
            await asyncio.sleep(PROBE_EVERY_S)
    return min(recovered()) - ended_s if recovered() else None


class Memory:
    """Resident bytes of every process of the cluster, over time."""

    def __init__(self, cluster: Cluster) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in cluster.pids().items()}
        self.samples: list[dict[str, int]] = []

    async def watch(self) -> None:
        while True:
            self.samples.append({name: one.memory_info().rss for name, one in self._processes.items()})
            await asyncio.sleep(SAMPLE_S)

    def growth(self) -> dict[str, float]:
        """By how much each process was larger in the last fifth of the time than in the second one."""
        fifth = max(1, len(self.samples) // 5)
        early, late = self.samples[fifth : 2 * fifth], self.samples[-fifth:]
        return {
            name: statistics.median(one[name] for one in late) / statistics.median(one[name] for one in early)
            - 1
            for name in self._processes
        }


@dataclass(frozen=True)
class Found:
    phases: list[Phase]
    overload: Phase
    growth: dict[str, float]
    usual_s: float
    recovery_s: float | None


async def measure(load: Load, cluster: Cluster, *, seconds: float, overload_s: float, factor: float) -> Found:
    capacity = await sustained(load)
    phases = [await offer(load, share * capacity, seconds) for share in RATES]
    usual_s = phases[0].slowest_tenth_s()
    memory = Memory(cluster)
    watching = asyncio.create_task(memory.watch())
    overload_task = asyncio.create_task(offer(load, factor * capacity, overload_s))
    await asyncio.sleep(overload_s)
    recovered = asyncio.create_task(recovery_s(load, time.monotonic(), usual_s))
    watching.cancel()
    overload = await overload_task
    found = Found(phases, overload, memory.growth(), usual_s, await recovered)
    load.close()
    return found


def rows(found: Found, slo_s: float) -> Iterator[tuple[str, ...]]:
    for phase in (*found.phases, found.overload):
        statuses = phase.statuses()
        others = len(phase.ended) - statuses[200] - statuses[429]
        yield (
            f"{phase.rate_per_s:.1f}",
            str(len(phase.ended)),
            f"{phase.goodput_per_s(slo_s):.2f}",
            str(statuses[200]),
            str(statuses[429]),
            str(others),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="15 s of overload instead of 60")
    parser.add_argument("--factor", type=float, default=20.0, help="times the load that is sustained")
    parser.add_argument("--slo", type=float, default=3.0, help="seconds to the first token of a good answer")
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(512, 128), metavar="N", help="in and out per request"
    )
    given = parser.parse_args()
    seconds, overload_s = (8.0, 15.0) if given.quick else (20.0, 60.0)
    # Who would wait longer than is good is refused: that is what the setting is for. A second of prompts
    # waits at the workers besides. The KV pool is so small that all of it was used before memory is read.
    flags = ("--queue-timeout-s", str(given.slo / 6), "--kv-blocks", str(KV_BLOCKS))
    with tempfile.TemporaryDirectory() as folder, run_cluster(Path(folder), *flags) as cluster:
        load = Load(cluster.base_url, *given.tokens)
        run = measure(load, cluster, seconds=seconds, overload_s=overload_s, factor=given.factor)
        found = asyncio.run(run)
    table = Table(title="Requests of {} + {} tokens".format(*given.tokens))
    for column in ("offered /s", "sent", f"good /s (TTFT <= {given.slo:g} s)", "200", "429", "other"):
        table.add_column(column, justify="right")
    for row in rows(found, given.slo):
        table.add_row(*row)
    Console(file=sys.stdout, width=110).print(table)
    peak = max(phase.goodput_per_s(given.slo) for phase in found.phases)
    overload = found.overload
    refused = [one for one in overload.ended if one.status == 429]
    told = sum(one.retry_after for one in refused)
    others = sum(one.status not in (200, 429) for one in overload.ended)
    figures = [
        figure("peak_goodput", peak, "requests/s"),
        figure("overload_offered", overload.rate_per_s, "requests/s"),
        figure("overload_goodput", overload.goodput_per_s(given.slo), "requests/s"),
        figure("overload_goodput_of_peak", overload.goodput_per_s(given.slo) / peak, "ratio", at_least=0.9),
        figure("overload_refused_with_retry_after", told / max(1, len(refused)), "ratio", at_least=1.0),
        figure("overload_failed_otherwise", others, "requests", at_most=0),
        figure("overload_memory_growth", max(found.growth.values()), "ratio", at_most=0.05),
        figure("recovery_after_overload", found.recovery_s, "s", at_most=2.0),
    ]
    for process, growth in found.growth.items():
        print(f"{process} grew by {100 * growth:.1f} % while overloaded")
    print(f"at the lowest rate nine in ten requests had their first token within {found.usual_s:.3f} s")
    print_report("overload", figures)


if __name__ == "__main__":
    main()
