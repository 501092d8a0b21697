"""Step times from files: of `baton profile`, and what DistServe's and Splitwise's authors measured."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from statistics import median

import msgspec

from baton.config import BadSetting
from baton.profile import Profile
from baton.sim.speed import LinearSpeed, Speed, TableSpeed

_DATA = files("baton.sim") / "data"

NAMES = (
    "a file of `baton profile`, distserve:MODEL:TP (such as distserve:opt-13b:2) or "
    "splitwise:MODEL:HARDWARE:TP (such as splitwise:llama2-70b:h100-80gb:8)"
)


def speed_of(name: str) -> Speed:
    """The step times that `name` stands for.

    Raises:
        BadSetting: there are no such step times; says which there are.
    """
    kind, _, rest = name.partition(":")
    if kind == "distserve":
        return _distserve(name, rest)
    if kind == "splitwise":
        return _splitwise(name, rest)
    path = Path(name)
    if not path.is_file():
        raise BadSetting(f"--profile {name}: no such file; give {NAMES}", field="profile")
    try:
        return measured(msgspec.json.decode(path.read_bytes(), type=Profile))
    except (msgspec.DecodeError, ValueError) as error:
        raise BadSetting(
            f"--profile {name} is not what `baton profile` writes: {error}", field="profile"
        ) from error


def measured(profile: Profile) -> TableSpeed:
    """The step times that `baton profile` measured.

    Raises:
        ValueError: it measured no prefill or no decode steps.
    """
    if not profile.prefill or not profile.decode:
        raise ValueError("it has no prefill or no decode steps")
    return TableSpeed(
        {point.tokens: point.seconds for point in profile.prefill},
        {(step.batch, step.context): step.seconds for step in profile.decode},
    )


def _distserve(name: str, rest: str) -> Speed:
    table = json.loads((_DATA / "distserve_a100.json").read_text())
    known = {f"{model.split('/')[-1]}:{tp}": steps for model, by in table.items() for tp, steps in by.items()}
    if rest not in known:
        raise BadSetting(f"--profile {name}: DistServe measured {', '.join(sorted(known))}", field="profile")
    steps = known[rest]

    def seconds(kind: str) -> tuple[float, float, float]:
        base, linear, last = (number / 1000 for number in steps[kind])
        return base, linear, last

    return LinearSpeed(
        prefill=seconds("prefill"),
        decode=seconds("decoding_smallbs"),
        large_decode=seconds("decoding_largebs"),
        large_batch=steps["decoding_large_small_bs_threshold"],
    )


def _splitwise(name: str, rest: str) -> Speed:
    """Prompts of several requests count as one as long as all together, as in Splitwise's simulator."""
    prompts: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    tokens: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader((_DATA / "splitwise.csv").read_text().splitlines()):
        key = f"{row['model']}:{row['hardware']}:{row['tensor_parallel']}"
        size, batch = int(row["prompt_size"]), int(row["batch_size"])
        prompts[key][size * batch].append(float(row["prompt_time"]) / 1000)
        tokens[key][batch, size].append(float(row["token_time"]) / 1000)
    if rest not in prompts:
        raise BadSetting(
            f"--profile {name}: Splitwise measured {', '.join(sorted(prompts))}", field="profile"
        )
    return TableSpeed(
        {size: median(seconds) for size, seconds in prompts[rest].items()},
        {shape: median(seconds) for shape, seconds in tokens[rest].items()},
    )
