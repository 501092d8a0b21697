"""Which requests are sent: made up or recorded, as token ids or as words, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from math import ceil
from random import Random

from baton.bench.arrivals import Pattern, arrivals
from baton.bench.trace import TraceRow

# Ids that are ordinary tokens of any vocabulary: above the bytes, below where small ones end.
_TOKENS = range(256, 2048)
_TEXT = (
    "about after again all also and any are back because been before being between both but came can come "
    "could day did different does down each even every find first for form found from gave get give good "
    "great had hand has have head help her here high him his home house how into just keep kind know large "
    "last left less life light like line little live long look made make man many may mean men might more "
    "most move much must name need never new next night not now number off old once one only open other our "
    "out over own page part people place point put read right said same saw say second see sentence set she "
    "should show side small some something sound spell state still stop story study such take tell than "
    "that the their them then there these they thing think this those thought three time together told took "
    "too tree turn two under until use very want was water way well went were what when where which while "
    "white who why will with word work world would write year you young your"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to send: `prompt` is text or token ids. `at_s` is when it is due; in a closed loop it is
    due when it is sent."""

    at_s: float
    prompt: str | tuple[int, ...]
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Synthetic:
    """Made-up requests: lengths in tokens, drawn evenly from `1 - spread` to `1 + spread` times the mean.

    The first `prefix_tokens` of the input are the same in all requests.
    """

    input_tokens: int
    output_tokens: int
    prefix_tokens: int = 0
    spread: float = 0.0

    def rows(self, rng: Random) -> Iterator[TraceRow]:
        """Endless requests, all at 0 s. Block 0 is the common prefix, negative blocks are one request's."""
        number = 0
        while True:
            number += 1
            inputs = max(1, self.prefix_tokens, self._drawn(self.input_tokens, rng))
            outputs = self._drawn(self.output_tokens, rng)
            if self.prefix_tokens:
                yield TraceRow(0.0, inputs, outputs, (0, -number), self.prefix_tokens)
            else:
                yield TraceRow(0.0, inputs, outputs)

    def _drawn(self, tokens: int, rng: Random) -> int:
        return max(1, round(tokens * rng.uniform(1 - self.spread, 1 + self.spread)))


def scaled(rows: Iterable[TraceRow], lengths: float, speed: float) -> Iterator[TraceRow]:
    """A trace with all lengths multiplied by `lengths`, played `speed` times as fast. What prompts share
    they still share: blocks shrink with them."""
    for row in rows:
        yield replace(
            row,
            arrival_s=row.arrival_s / speed,
            input_tokens=max(1, round(row.input_tokens * lengths)),
            output_tokens=max(1, round(row.output_tokens * lengths)),
            block_tokens=max(1, round(row.block_tokens * lengths)) if row.block_tokens else 0,
            text=row.text[: max(1, round(len(row.text) * lengths))] if lengths < 1 else row.text,
        )


def timed(
    rows: Iterable[TraceRow], pattern: Pattern, rate_per_s: float, rng: Random, burstiness: float = 1.0
) -> Iterator[TraceRow]:
    """The rows, due at times of an arrival process instead of their own."""
    for row, at_s in zip(rows, arrivals(pattern, rate_per_s, rng, burstiness), strict=False):
        yield replace(row, arrival_s=at_s)


def cut(rows: Iterable[TraceRow], requests: int | None, duration_s: float | None) -> list[TraceRow]:
    """So many of the rows, or those of so many seconds; whichever ends first."""
    if duration_s is not None:
        rows = takewhile(lambda row: row.arrival_s < duration_s, rows)
    return list(islice(rows, requests))


class Prompts:
    """Turns rows into prompts: equal blocks become equal tokens, different ones different tokens.

    Args:
        words_per_token: None for prompts of token ids; for text, how many of the words here make a token of
            the server's (see `baton.bench.client.Client.calibrate`).
    """

    def __init__(self, seed: int, words_per_token: float | None = None) -> None:
        self._seed = seed
        self._words_per_token = words_per_token
        self._blocks: dict[int, Sequence[int]] = {}

    def request(self, row: TraceRow, number: int) -> LoadRequest:
        """What to send for a row; rows without block ids share nothing with others."""
        if row.text:
            return LoadRequest(row.arrival_s, row.text, row.input_tokens, row.output_tokens)
        ids: Sequence[int] = row.block_ids or (-1 - number,)
        size = row.block_tokens or row.input_tokens
        draws: list[int] = []
        for at, block in enumerate(ids):
            # The last block goes on as long as the prompt does.
            wanted = row.input_tokens - len(draws) if at == len(ids) - 1 else size
            draws += self._block(block, min(wanted, row.input_tokens - len(draws)))
        if self._words_per_token is None:
            prompt = tuple(_TOKENS[draw % len(_TOKENS)] for draw in draws)
            return LoadRequest(row.arrival_s, prompt, row.input_tokens, row.output_tokens)
        words = ceil(len(draws) * self._words_per_token)
        # More words than tokens: go round again; fewer: leave out the last.
        text = " ".join(_WORDS[draws[at % len(draws)] % len(_WORDS)] for at in range(words))
        return LoadRequest(row.arrival_s, text, row.input_tokens, row.output_tokens)

    def _block(self, block: int, tokens: int) -> Sequence[int]:
        """The first numbers of a block's endless row of them."""
        known = self._blocks.get(block, ())
        if len(known) < tokens:
            rng = Random(f"{self._seed}/{block}")
            known = [rng.getrandbits(30) for _ in range(tokens)]
            if block >= 0:
                self._blocks[block] = known
        return known[:tokens]
