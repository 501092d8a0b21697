"""guidellm, the independent load generator of `benchmarks/stack.py`: how it is called and what it reports."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROMPT_TOKENS, OUTPUT_TOKENS, STREAMS = 512, 64, 4


@dataclass(frozen=True)
class Served:
    """What the client saw: output tokens per second, and medians over requests in seconds."""

    tokens_per_s: float
    ttft_s: float
    tpot_s: float


def put_load(python: Path, url: str, model: Path, requests: int, seed: int, folder: Path) -> Served:
    """Stream `requests` completions of random text from `url`, `STREAMS` at a time; `seed` draws the prompts.

    `python` has guidellm 0.8 or newer.

    Raises:
        RuntimeError: it failed, or not all requests were answered in full.
    """
    report = folder / f"guidellm-{seed}.json"
    report.unlink(missing_ok=True)
    command = [
        *(str(python.parent / "guidellm"), "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={url},model={model},request_format=/v1/completions"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={model}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
        *("--seed", f"kind=static,value={seed}"),
        *("--output", f"kind=json,path={report}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode or not report.exists():
        raise RuntimeError(f"guidellm failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return _read(json.loads(report.read_text())["benchmarks"][0], requests)


def _read(benchmark: dict[str, object], asked: int) -> Served:
    metrics, done = benchmark["metrics"], benchmark["requests"]["successful"]  # type: ignore[index, call-overload]
    tokens = [request["output_tokens"] for request in done]
    if len(tokens) < asked or set(tokens) != {OUTPUT_TOKENS}:
        raise RuntimeError(f"{len(tokens)} of {asked} requests were answered, with {set(tokens)} tokens")
    began_s = min(request["request_start_time"] for request in done)
    ended_s = max(request["request_end_time"] for request in done)

    def median_s(name: str) -> float:
        return float(metrics[name]["successful"]["median"]) / 1e3

    ttft_s, tpot_s = median_s("time_to_first_token_ms"), median_s("inter_token_latency_ms")
    return Served(sum(tokens) / (ended_s - began_s), ttft_s, tpot_s)
