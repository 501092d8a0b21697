"""What one `baton bench` does: which load goes to which server, in which order, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from baton.bench.arrivals import Pattern
from baton.bench.client import Client, NobodyAnswers
from baton.bench.drive import closed_loop, open_loop, until
from baton.bench.load import LoadRequest, Prompts, Synthetic, cut, scaled, timed
from baton.bench.records import RequestRecord
from baton.bench.result import Run, run_of
from baton.bench.summary import Targets, summarize
from baton.bench.trace import TraceKind, TraceRow, kind_of, read_trace
from baton.config import BadSetting

Begin = Callable[[str, int | None], Callable[[RequestRecord], None]]
"""Told of each run its label and how many requests it has, if that is known; gives what hears of each."""


@dataclass(frozen=True)
class Server:
    """Whom to load: a name for the report, and its client."""

    label: str
    client: Client


@dataclass(frozen=True)
class Load:
    """The load, the same for every server.

    With `concurrency` a closed loop; else an open one at each of `rates`, or at a trace's own times if
    there are none. `requests` and `duration_s` bound each run.
    """

    synthetic: Synthetic
    trace: Path | None
    trace_kind: TraceKind | None
    trace_speed: float
    length_scale: float
    rates: tuple[float, ...]
    pattern: Pattern
    burstiness: float
    concurrency: int | None
    requests: int | None
    duration_s: float | None
    warmup: int
    seed: int
    text: bool

    def check(self) -> None:
        """
        Raises:
            BadSetting: the parts contradict each other; says which flags.
        """
        if self.concurrency is not None and self.rates:
            raise BadSetting(
                "--concurrency is a closed loop and --request-rate an open one; give one of them"
            )
        if self.trace is None and self.concurrency is None and not self.rates:
            raise BadSetting("give --request-rate, --concurrency, or a --trace to replay at its own times")
        if self.requests is None and self.duration_s is None and (self.trace is None or self.rates):
            raise BadSetting("say how much: --num-prompts or --duration")
        if self.trace is None and self.synthetic.prefix_tokens > self.synthetic.input_tokens:
            raise BadSetting("--prefix-len is more than --input-len")

    def rows(self) -> list[TraceRow]:
        """The trace's requests, lengths scaled; none without one.

        Raises:
            BadSetting: the trace cannot be read.
        """
        if self.trace is None:
            return []
        read = read_trace(self.trace, self.trace_kind or kind_of(self.trace))
        return list(scaled(read, self.length_scale, self.trace_speed))

    def at(self, trace: Sequence[TraceRow], rate: float | None) -> tuple[str, Iterable[TraceRow]]:
        """The requests of a run, and the run in words."""
        rng = Random(self.seed)
        rows: Iterable[TraceRow] = trace if trace else self.synthetic.rows(rng)
        source = self.trace.name if self.trace is not None else self._lengths()
        if self.concurrency is not None:
            bounded = rows if self.requests is None else cut(rows, self.requests, None)
            return f"closed loop of {self.concurrency}, {source}", bounded
        if rate is not None:
            arriving = timed(rows, self.pattern, rate, Random(self.seed + 1), self.burstiness)
            return f"{self.pattern} at {rate:g}/s, {source}", cut(arriving, self.requests, self.duration_s)
        return f"replay of {source}", cut(rows, self.requests, self.duration_s)

    def _lengths(self) -> str:
        made = self.synthetic
        spread = f" +-{100 * made.spread:.0f} %" if made.spread else ""
        return f"{made.input_tokens} tokens in, {made.output_tokens} out{spread}"


@dataclass(frozen=True)
class Bench:
    """Loads servers one after the other, each with the same requests."""

    load: Load
    targets: Targets
    price_per_hour: float | None

    async def run(self, servers: Sequence[Server], begin: Begin) -> list[Run]:
        """Every rate on every server.

        Raises:
            NobodyAnswers: a server is not there.
            BadSetting: the load cannot be made.
        """
        self.load.check()
        trace = self.load.rows()
        runs = []
        for server in servers:
            async with server.client as client:
                await client.model()
                text = self.load.text or not client.takes_token_ids
                prompts = Prompts(self.load.seed, await client.calibrate() if text else None)
                if self.load.warmup:
                    await self._warm_up(client, trace, begin(f"{server.label}: warm-up", self.load.warmup))
                for rate in self.load.rates or (None,):
                    runs.append(await self._one(server, client, prompts, trace, rate, begin))
        return runs

    async def _one(
        self,
        server: Server,
        client: Client,
        prompts: Prompts,
        trace: Sequence[TraceRow],
        rate: float | None,
        begin: Begin,
    ) -> Run:
        load = self.load
        label = server.label if len(load.rates) < 2 else f"{server.label} @ {rate:g}/s"
        words, rows = load.at(trace, rate)
        total = len(rows) if isinstance(rows, Sequence) else None
        requests = (prompts.request(row, number) for number, row in enumerate(rows))
        progress = begin(label, total)
        if load.concurrency is None:
            # Made beforehand: making prompts must not make the client late.
            records = await open_loop(client, list(requests), progress)
        else:
            bounded = requests if load.duration_s is None else until(requests, load.duration_s)
            records = await closed_loop(client, bounded, load.concurrency, progress)
        if not len(records):
            raise BadSetting("the load has no requests; raise --duration or --num-prompts")
        summary = summarize(records, self.targets, self.price_per_hour)
        return run_of(label, words, rate, records, summary)

    async def _warm_up(
        self, client: Client, trace: Sequence[TraceRow], progress: Callable[[RequestRecord], None]
    ) -> None:
        """Requests like those to come, with prompts of their own, a few at a time; not in any figure.

        Raises:
            NobodyAnswers: none of them was answered.
        """
        rng = Random(self.load.seed + 2)
        rows: Iterator[TraceRow] = iter(trace) if trace else self.load.synthetic.rows(rng)
        text = self.load.text or not client.takes_token_ids
        prompts = Prompts(self.load.seed + 1, 1.0 if text else None)
        warm = cut(rows, self.load.warmup, None)
        requests: list[LoadRequest] = [prompts.request(row, number) for number, row in enumerate(warm)]
        errors = (await closed_loop(client, requests, 4, progress)).errors
        if errors.total() == len(requests):
            raise NobodyAnswers(
                f"the server refused every request of the warm-up: {', '.join(errors)}; see what it logs"
            )


def run_bench(bench: Bench, servers: Sequence[Server], begin: Begin) -> list[Run]:
    """`Bench.run` on an event loop of its own, which uvloop runs."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bench.run(servers, begin))
