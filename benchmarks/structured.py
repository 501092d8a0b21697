"""What a JSON schema costs: tokens per second of answers that are held to one, against answers that are not.

One hybrid worker behind a router, requests of the same lengths, guided and unguided in turn. The schema is so
long that no answer completes it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

import uvloop
from engine import SHAPES
from rich.console import Console
from rich.table import Table
from served import Figure, figure, print_report, random_tokens, served_folder, stream

from tests.cluster import ROOT, run_cluster

BATCHES = (1, 8)
PROMPT_TOKENS, TOKENS = 64, 160
_MEMBER = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"enum": ["a", "bc", "d"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
_SCHEMA = {"type": "array", "items": _MEMBER, "minItems": 500}
WAYS: dict[str, Mapping[str, object]] = {
    "free": {},
    "guided": {"structured_outputs": {"json": _SCHEMA}, "temperature": 1.0, "seed": 1},
    "free, drawn": {"temperature": 1.0, "seed": 1},
}


async def tokens_per_s(base_url: str, batch: int, more: Mapping[str, object], draw: random.Random) -> float:
    """Of `batch` requests at once, from first tokens to last."""
    prompts = [random_tokens(PROMPT_TOKENS, draw) for _ in range(batch)]
    done = await asyncio.gather(*(stream(base_url, prompt, TOKENS, more=more) for prompt in prompts))
    return batch / median(one.tpot_s for one in done)


def measure(folder: Path, rounds: int) -> dict[tuple[str, int], float]:
    """Tokens per second by way and batch, medians."""
    draw = random.Random(0)
    taken: dict[tuple[str, int], list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        run_cluster(Path(scratch), "--hybrid", "1", "--dtype", "bfloat16", model=folder) as cluster,
    ):
        for number in range(rounds + 1):  # the first round warms up
            for batch in BATCHES:
                for way, more in WAYS.items():
                    rate = uvloop.run(tokens_per_s(cluster.base_url, batch, more, draw))
                    if number:
                        taken.setdefault((way, batch), []).append(rate)
    return {key: median(rates) for key, rates in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the bundled model alone, few rounds")
    quick = parser.parse_args().quick
    models = {"bundled": ROOT / "models" / "baton-small"}
    if not quick:
        models["250m"] = served_folder(SHAPES["250m"])
    console = Console(width=100)
    figures: list[Figure] = []
    for name, folder in models.items():
        rates = measure(folder, 3 if quick else 7)
        table = Table("batch", *WAYS, "guided : drawn", title=f"tokens/s, {name} model in bfloat16")
        for batch in BATCHES:
            ratio = rates["guided", batch] / rates["free, drawn", batch]
            table.add_row(str(batch), *(f"{rates[way, batch]:.1f}" for way in WAYS), f"{ratio:.3f}")
            peer = f"unguided, drawn: {rates['free, drawn', batch]:.4g} tokens/s"
            figures.append(figure(f"guided_{name}_batch_{batch}", ratio, "ratio", peer=peer))
        console.print(table)
    print_report("structured", figures, {"llguidance": version("llguidance")})


if __name__ == "__main__":
    main()
