"""What `baton top` shows of a cluster."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from baton.cli.top import Rates, render
from baton.cluster_now import ClusterNow, FlowNow, Goodput, Latency, Percentiles, Requests, WorkerNow


def worker(worker_id: str, role: str, *, free: int = 60, cached: int = 70, usable: bool = True) -> WorkerNow:
    return WorkerNow(
        id=worker_id,
        incarnation="one",
        role=role,
        address="127.0.0.1:1",
        usable=usable,
        draining=False,
        avoided=False,
        running=3,
        waiting=1,
        queued_tokens=512,
        total_blocks=100,
        free_blocks=free,
        cached_blocks=cached,
        block_bytes=1024,
    )


NOW = ClusterNow(
    version="1",
    model="small",
    chat=True,
    policy="prefix",
    time_s=100.0,
    kvstore_connected=False,
    index_blocks=5,
    workers=[worker("decode-0", "decode"), worker("prefill-0", "prefill", usable=False)],
    flows=[FlowNow("prefill-0", "decode-0", 10_000_000)],
    requests=Requests(running=3, waiting=0, prompt_tokens=10, output_tokens=500),
    latency=Latency(ttft=Percentiles(0.1, 0.2, 1.5), tpot=None, e2e=None),
    goodput={"interactive": Goodput(ended=10, good=9)},
    targets=(2.0, 0.1),
    recent=[],
)
BEFORE = msgspec.structs.replace(
    NOW,
    time_s=98.0,
    flows=[],
    requests=Requests(running=0, waiting=0, prompt_tokens=0, output_tokens=300),
)


def text(rates: Rates) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(NOW, rates))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rates_are_differences_between_two_looks() -> None:
    rates = Rates.between(BEFORE, NOW)
    assert rates.tokens == pytest.approx(100)
    assert rates.flows == {("prefill-0", "decode-0"): pytest.approx(5e6)}
    assert Rates.between(None, NOW) == Rates(0.0, {})


def test_a_restarted_router_has_no_negative_rates() -> None:
    rates = Rates.between(
        msgspec.structs.replace(NOW, time_s=99.0), msgspec.structs.replace(BEFORE, time_s=100.0)
    )
    assert rates == Rates(0.0, {})


def test_it_shows_workers_load_trouble_and_flows() -> None:
    shown = text(Rates.between(BEFORE, NOW))
    assert "no kvstore" in shown
    assert "100.0 ms (p99 1.50 s)" in shown
    assert "goodput 90%" in shown
    assert "prefill-0 → decode-0  5.0 MB/s" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("decode-0")]
    assert "██████▒▒▒▒▒·····" in line
    (line,) = [line for line in shown.splitlines() if line.startswith("prefill-0  ")]
    assert line.rstrip().endswith("connecting")
