"""Does `baton bench` measure a real cluster, over each of its interfaces, and say so in every form?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from baton.bench.result import load
from tests.cluster import ROOT, Cluster

BENCH = (sys.executable, "-m", "baton.cli.main", "bench")
SMALL = ("--input-len", "40", "--output-len", "8", "--warmup", "2", "--num-prompts", "6")


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_open_loop_over_two_rates_is_told_in_table_json_and_html(cluster: Cluster, tmp_path: Path) -> None:
    out, html = tmp_path / "a.json", tmp_path / "a.html"
    load_flags = (*SMALL, "--request-rate", "10,20", "--slo-ttft", "60", "--slo-tpot", "60")
    done = bench("--url", cluster.base_url, *load_flags, "--out", str(out), "--html", str(html))
    assert done.returncode == 0, done.stderr
    assert "TTFT p99" in done.stdout
    runs = load(out).runs
    assert [run.rate for run in runs] == [10.0, 20.0]
    for run in runs:
        summary = run.summary
        assert (summary.requests, summary.failed) == (6, 0)
        assert (summary.input_tokens, summary.output_tokens) == (6 * 40, 6 * 8)
        assert summary.attainment == 1.0
        assert summary.ttft is not None
        assert summary.e2e is not None
        assert 0 < (summary.ttft.p50 or 0) <= (summary.e2e.p50 or 0)
    text = html.read_text()
    assert text.count("<svg") == 4
    assert "<script" not in text
    assert 'src="http' not in text


def test_chat_grpc_and_a_trace_are_served_in_full(cluster: Cluster, tmp_path: Path) -> None:
    trace = ROOT / "tests" / "data" / "mooncake_conversation_excerpt.jsonl"
    replay = ("--trace", str(trace), "--length-scale", "0.01", "--trace-speed", "10", "--num-prompts", "6")
    grpc = ("--url", cluster.grpc_address, "--endpoint", "grpc")
    chat = ("--url", cluster.base_url, "--endpoint", "chat")
    for name, flags in {
        "grpc": (*grpc, *SMALL, "--concurrency", "2"),
        "replay": (*grpc, *replay),
        "chat": (*chat, *SMALL, "--concurrency", "2"),
    }.items():
        out = tmp_path / f"{name}.json"
        done = bench(*flags, "--out", str(out))
        assert done.returncode == 0, done.stderr
        summary = load(out).runs[0].summary
        assert (summary.requests, summary.failed) == (6, 0), name
    compared = bench("--compare", str(tmp_path / "grpc.json"), str(tmp_path / "chat.json"))
    assert compared.returncode == 0
    assert "grpc" in compared.stdout
    assert "chat" in compared.stdout


def test_failed_requests_are_counted_and_not_left_out(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    # Longer than the model's context: every request is refused.
    flags = ("--input-len", "20000", "--num-prompts", "3", "--concurrency", "1", "--warmup", "0")
    done = bench("--url", cluster.base_url, *flags, "--out", str(out))
    assert done.returncode == 0, done.stderr
    summary = load(out).runs[0].summary
    assert summary.errors == {"HTTP 400": 3}
    assert summary.ttft is not None
    assert summary.ttft.p50 is None
    refused = bench("--url", cluster.base_url, *flags[:-2])
    assert refused.returncode == 1
    assert "refused every request of the warm-up" in refused.stderr


def test_a_server_that_is_not_there_is_said() -> None:
    dead = bench("--url", "http://127.0.0.1:9", "--request-rate", "1", "--num-prompts", "1")
    assert dead.returncode == 1
    assert "nobody answers at http://127.0.0.1:9" in dead.stderr


def test_the_simulator_reports_in_the_same_form(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    flags = (
        "--profile",
        "distserve:opt-13b:1",
        "--hybrid",
        "2",
        "--request-rate",
        "4",
        "--num-prompts",
        "20",
    )
    done = subprocess.run(
        [*BENCH[:-1], "simulate", *flags, "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (load(out).kind, load(out).runs[0].summary.requests) == ("simulate", 20)
