"""Recorded workloads: when requests came, how long they were, what they shared."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from baton.config import BadSetting

TraceKind = Literal["mooncake", "azure", "sharegpt"]

MOONCAKE_BLOCK_TOKENS = 512
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request.

    `block_ids` name the prompt's blocks of `block_tokens` tokens, the last one perhaps in part: prompts with
    equal ids begin alike. Empty where the trace does not say. `text` is the prompt itself where that was
    recorded; the tokens are then estimated at four characters each.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: Sequence[int] = ()
    block_tokens: int = 0
    text: str = ""


def read_trace(path: Path, kind: TraceKind) -> list[TraceRow]:
    """The requests of a file, in order of arrival; the first comes at 0 s.

    Raises:
        BadSetting: the file is not such a trace; names the file and what is wrong.
    """
    readers = {"mooncake": _mooncake, "azure": _azure, "sharegpt": _sharegpt}
    try:
        rows = readers[kind](path.read_text())
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise BadSetting(
            f"--trace {path} cannot be read as {kind}: {type(error).__name__}: {error}"
        ) from error
    if not rows:
        raise BadSetting(f"--trace {path} has no requests")
    return rows


def kind_of(path: Path) -> TraceKind:
    """What a file looks like by its name: .jsonl Mooncake's, .csv Azure's, .json ShareGPT's.

    Raises:
        BadSetting: it looks like none.
    """
    kinds: dict[str, TraceKind] = {".jsonl": "mooncake", ".csv": "azure", ".json": "sharegpt"}
    if path.suffix not in kinds:
        raise BadSetting(f"--trace {path}: say with --trace-kind what it is: {', '.join(kinds.values())}")
    return kinds[path.suffix]


def sessions(rows: Iterable[TraceRow]) -> Iterator[tuple[TraceRow, str]]:
    """Each row with a name for its conversation, which no trace gives.

    A prompt that goes on from all full blocks of an earlier one, more than one, belongs to that one's.
    """
    ends: dict[int, str] = {}
    for number, row in enumerate(rows):
        full = row.block_ids[: row.input_tokens // row.block_tokens] if row.block_tokens else ()
        earlier = (ends[block] for block in reversed(full[1:]) if block in ends)
        session = next(earlier, f"s{number}")
        if len(full) > 1:
            ends[full[-1]] = session
        yield row, session


def _mooncake(text: str) -> list[TraceRow]:
    """JSON lines of timestamp (ms), input_length, output_length, hash_ids (of blocks of 512 tokens).

    Requests with the same time stamp, which some of the traces round to seconds, are spread evenly up to
    the next one.
    """
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.strip()]
    rows.sort(key=lambda row: int(row["timestamp"]))
    stamps = sorted({int(row["timestamp"]) for row in rows})
    following = dict(zip(stamps, [*stamps[1:], stamps[-1] + 1 if stamps else 0], strict=True))
    together = Counter(int(row["timestamp"]) for row in rows)
    before: Counter[int] = Counter()
    found: list[TraceRow] = []
    for row in rows:
        stamp = int(row["timestamp"])
        share = before[stamp] / together[stamp]
        before[stamp] += 1
        found.append(
            TraceRow(
                (stamp - stamps[0] + share * (following[stamp] - stamp)) / 1000,
                max(1, int(row["input_length"])),
                max(1, int(row["output_length"])),
                tuple(map(int, row["hash_ids"])),
                MOONCAKE_BLOCK_TOKENS,
            )
        )
    return found


def _azure(text: str) -> list[TraceRow]:
    """CSV of TIMESTAMP, ContextTokens, GeneratedTokens."""
    timed = []
    for row in csv.DictReader(text.splitlines()):
        # Seven decimals of a second are one more than Python reads.
        time = datetime.fromisoformat(row["TIMESTAMP"][:26])
        timed.append((time, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))))
    timed.sort()
    return [
        TraceRow((time - timed[0][0]).total_seconds(), inputs, outputs) for time, inputs, outputs in timed
    ]


def _sharegpt(text: str) -> list[TraceRow]:
    """JSON list of conversations, of which the first turn is the prompt and the second says how long the
    answer is. Nothing says when they came: all at 0 s."""
    found = []
    for entry in json.loads(text):
        turns = entry.get("conversations") or entry.get("conversation") or []
        if len(turns) >= 2 and turns[0]["value"] and turns[1]["value"]:
            prompt, answer = turns[0]["value"], turns[1]["value"]
            found.append(TraceRow(0.0, _estimated(prompt), _estimated(answer), text=prompt))
    return found


def _estimated(text: str) -> int:
    return max(1, len(text) // _CHARACTERS_PER_TOKEN)
