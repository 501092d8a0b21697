"""The file of one or more runs: figures, and enough of the requests to draw them again."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import msgspec

from baton.bench.records import Records
from baton.bench.summary import Summary
from baton.config import BadSetting

_MOST_ROWS = 20_000


class Requests(msgspec.Struct, frozen=True):
    """Requests in columns, at most 20 000 of them, evenly chosen; None where a request failed."""

    scheduled_s: list[float]
    ttft_s: list[float | None]
    tpot_s: list[float | None]
    e2e_s: list[float | None]
    input_tokens: list[int]
    output_tokens: list[int]


class Run(msgspec.Struct, frozen=True):
    """One load on one server. `load` says in words what was asked, `rate` how many requests per second."""

    label: str
    load: str
    rate: float | None
    summary: Summary
    requests: Requests
    itl: list[tuple[float, int]]


class Result(msgspec.Struct, frozen=True):
    """What `baton bench` and `baton simulate` write with --out."""

    kind: str
    created: str
    versions: dict[str, str]
    settings: dict[str, str]
    runs: list[Run]


def run_of(label: str, load: str, rate: float | None, records: Records, summary: Summary) -> Run:
    """A run from its records."""
    step = -(-len(records) // _MOST_ROWS) or 1
    rows = [record for at, record in enumerate(records) if at % step == 0]
    requests = Requests(
        [round(row.scheduled_s, 6) for row in rows],
        [_known(row.ttft_s) for row in rows],
        [_known(row.tpot_s) for row in rows],
        [_known(row.e2e_s) for row in rows],
        [row.input_tokens for row in rows],
        [row.output_tokens for row in rows],
    )
    return Run(label, load, rate, summary, requests, [*records.gaps.ordered()])


def save(result: Result, path: Path) -> None:
    """Write a result as JSON."""
    path.write_bytes(msgspec.json.encode(result) + b"\n")


def load(path: Path) -> Result:
    """Read a result.

    Raises:
        BadSetting: there is none in the file.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except (OSError, msgspec.DecodeError) as error:
        raise BadSetting(f"{path} is not a result of `baton bench` or `baton simulate`: {error}") from error


def side_by_side(results: dict[str, Result]) -> Result:
    """All runs of several results as one, labelled by the names they are given here."""
    first = next(iter(results.values()))
    runs = [
        msgspec.structs.replace(run, label=name if len(result.runs) == 1 else f"{name} {run.label}")
        for name, result in results.items()
        for run in result.runs
    ]
    settings = {
        f"{name}: {key}": value for name, result in results.items() for key, value in result.settings.items()
    }
    return Result(first.kind, first.created, first.versions, settings, runs)


def _known(seconds: float) -> float | None:
    return round(seconds, 6) if isfinite(seconds) else None
