"""What benchmarks of a running cluster share: a model with words, streamed requests, CPU time, the report."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import psutil
from engine import CACHE, Shape, model_folder
from tokenizers import ByteLevelBPETokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Figure = dict[str, object]


def served_folder(shape: Shape) -> Path:
    """The random model of benchmarks/engine.py with a tokenizer beside it, for clients that send text.

    The tokenizer is byte-level BPE, trained on Python's standard library on first use; every token id of the
    model stands for some text.
    """
    weights, folder = model_folder(shape), CACHE / f"{shape.name}-text"
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for path in weights.iterdir():
            link = folder / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path)
        corpus = sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))
        texts = (path.read_text("utf-8", "replace") for path in corpus)
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(texts, vocab_size=shape.vocab, min_frequency=1, show_progress=False)
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
        trained.save(str(folder / "tokenizer.json"))
    return folder


def random_tokens(count: int, draw: random.Random) -> list[int]:
    """A prompt that shares no block with any other, of ids that every model here has."""
    return [draw.randrange(100, 4000) for _ in range(count)]


@dataclass(frozen=True)
class Streamed:
    """One streamed completion: when it was sent and when each token's event came, on the monotonic clock."""

    sent_s: float
    tokens_s: Sequence[float]

    @property
    def ttft_s(self) -> float:
        return self.tokens_s[0] - self.sent_s

    @property
    def second_s(self) -> float:
        """From the first token to the second."""
        return self.tokens_s[1] - self.tokens_s[0]

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.tokens_s[-1] - self.tokens_s[0]) / max(1, len(self.tokens_s) - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.tokens_s)]


def _deaf(number: int) -> None:
    """Who is told of tokens when nobody wants to know."""


async def stream(
    base_url: str,
    prompt: Sequence[int],
    tokens: int,
    *,
    heard: Callable[[int], None] = _deaf,
    timeout_s: float = 300.0,
    more: Mapping[str, object] | None = None,
) -> Streamed:
    """Send `prompt` and read exactly `tokens` tokens, one event each, over a connection of its own.

    `heard` is called with the number of each token, from 0, as it comes; `more` are further fields of the
    request.

    Raises:
        RuntimeError: the server answered something else.
    """
    host, _, port = base_url.removeprefix("http://").partition(":")
    asked = {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **(more or {}),
    }
    body = json.dumps({**asked, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            sent_s = time.monotonic()
            writer.write(head + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(f"the cluster answered {status!r}: {await reader.read(2000)!r}")
            arrived: list[float] = []
            while line := await reader.readline():
                if line.startswith(b"data: [DONE]"):
                    break
                if line.startswith(b"data: "):
                    heard(len(arrived))
                    arrived.append(time.monotonic())
        finally:
            writer.close()
    if len(arrived) != tokens:
        raise RuntimeError(f"{len(arrived)} events came where {tokens} tokens were asked for")
    return Streamed(sent_s, arrived)


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def main_thread_cpu_seconds(pid: int) -> float:
    """The part of `cpu_seconds` that the process's first thread used: of a worker, its event loop."""
    for thread in psutil.Process(pid).threads():
        if thread.id == pid:
            return float(thread.user_time + thread.system_time)
    raise LookupError(f"process {pid} has no main thread")


def figure(
    name: str,
    value: float | None,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    peer: str | None = None,
) -> Figure:
    """One figure of the report, with its goal if it has one; `peer` is what it was measured against, or why
    there is no value."""
    goal, met = None, None
    if at_least is not None:
        goal, met = f">= {at_least:g}", None if value is None else value >= at_least
    elif at_most is not None:
        goal, met = f"<= {at_most:g}", None if value is None else value <= at_most
    rounded = None if value is None else float(f"{value:.4g}")
    return {"figure": name, "value": rounded, "unit": unit, "goal": goal, "met": met, "peer": peer}


def print_report(
    benchmark: str, figures: Sequence[Figure], versions: Mapping[str, str] | None = None
) -> None:
    """The last line of a benchmark's output."""
    device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    known = {"torch": version("torch"), "python": platform.python_version(), **(versions or {})}
    print(json.dumps({"benchmark": benchmark, "device": device, "versions": known, "figures": list(figures)}))
