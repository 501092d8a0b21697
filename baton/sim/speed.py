"""How long a step takes on a simulated worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baton.engine.step_size import step_size
from baton.routing.view import Curve

PREFILL_SIZES = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODE_CONTEXT = 64


class Chunk(NamedTuple):
    """`tokens` of a prompt of which the first `start` are there already."""

    start: int
    tokens: int


class DecodeLine(NamedTuple):
    """A decode step of a certain batch: `fixed_s`, and `per_token_s` for every token of context in it."""

    fixed_s: float
    per_token_s: float


class Speed(ABC):
    """Seconds per engine step. A step that both prefills and decodes reads the weights once: it takes as
    long as the two apart, less `shared_s`."""

    shared_s: float

    @abstractmethod
    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """A step that computes these chunks and nothing else."""

    @abstractmethod
    def decode_line(self, batch: int) -> DecodeLine:
        """Decode steps of `batch` requests, against the tokens of context they have together."""

    def step_s(self, batch: int, context: int, chunks: Sequence[Chunk]) -> float:
        """A step of `batch` decoding requests with `context` tokens in all, and chunks of prompts."""
        if not batch:
            return self.prefill_s(chunks)
        fixed_s, per_token_s = self.decode_line(batch)
        decode_s = fixed_s + per_token_s * context
        if not chunks:
            return decode_s
        prefill_s = self.prefill_s(chunks)
        return max(prefill_s, decode_s, prefill_s + decode_s - self.shared_s)

    def step_size(self, max_batch_requests: int) -> int:
        """Tokens per step that a worker would choose by what it measured at its start."""
        return step_size(
            {size: self.prefill_s([Chunk(0, size)]) for size in PREFILL_SIZES}, max_batch_requests
        )

    def prefill_curve(self, longest: int) -> Curve:
        """What a worker would measure at its start: one prompt in one step, of up to `longest` tokens."""
        sizes = [size for size in PREFILL_SIZES if size < longest] + [longest]
        return Curve(tuple((size, self.prefill_s([Chunk(0, size)])) for size in sizes))

    def decode_curve(self, most: int) -> Curve:
        """What a worker would measure at its start: steps of up to `most` requests of short context."""
        lines = [(size, self.decode_line(size)) for size in DECODE_SIZES if size <= most]
        return Curve(
            tuple((size, line.fixed_s + line.per_token_s * DECODE_CONTEXT * size) for size, line in lines)
        )


@dataclass(frozen=True)
class LinearSpeed(Speed):
    """DistServe's model (OSDI 2024): prefill a + b * tokens + c * tokens^2, decode a + b * context +
    c * batch, with other coefficients from `large_batch` requests on. Seconds."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    large_decode: tuple[float, float, float]
    large_batch: int

    @property
    def shared_s(self) -> float:  # type: ignore[override]
        return min(self.prefill[0], self.decode[0])

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        base, linear, square = self.prefill
        tokens = sum(chunk.tokens for chunk in chunks)
        squares = sum((start + tokens) ** 2 - start**2 for start, tokens in chunks)
        return base + linear * tokens + square * squares

    def decode_line(self, batch: int) -> DecodeLine:
        base, per_token, per_request = self.decode if batch < self.large_batch else self.large_decode
        return DecodeLine(base + per_request * batch, per_token)


class TableSpeed(Speed):
    """Measured steps: lines between points, and beyond the last as between the last two.

    Args:
        prefill: seconds of a step with one whole prompt, by its tokens.
        decode: seconds of a decode step, by (requests, tokens of context each).
        shared_s: see `Speed`; None is what prefill takes at no tokens, by its first two points.
    """

    def __init__(
        self,
        prefill: Mapping[int, float],
        decode: Mapping[tuple[int, int], float],
        shared_s: float | None = None,
    ) -> None:
        self._prefill = Curve(tuple(sorted(prefill.items())))
        self._base_s = _intercept(self._prefill)
        self.shared_s = self._base_s if shared_s is None else shared_s
        contexts: dict[int, dict[int, float]] = {}
        for (batch, context), seconds in decode.items():
            contexts.setdefault(context, {})[batch] = seconds
        # The context at which most batches were measured says what a batch costs, others what context adds.
        self._context = max(contexts, key=lambda context: (len(contexts[context]), -context))
        self._decode = Curve(tuple(sorted(contexts[self._context].items())))
        self._slopes = Curve(tuple(sorted(_context_slopes(contexts, self._context).items())))
        self._lines: dict[int, DecodeLine] = {}

    def prefill_s(self, chunks: Sequence[Chunk]) -> float:
        seconds = self._prefill.seconds
        total_s = 0.0
        for start, tokens in chunks:
            alone = seconds(tokens)
            total_s += max(alone, seconds(start + tokens) - seconds(start)) if start else alone
        return total_s - (len(chunks) - 1) * self._base_s

    def decode_line(self, batch: int) -> DecodeLine:
        line = self._lines.get(batch)
        if line is None:
            per_token_s = self._slopes.seconds(batch) / batch
            fixed_s = self._decode.seconds(batch) - per_token_s * batch * self._context
            line = self._lines[batch] = DecodeLine(max(0.0, fixed_s), per_token_s)
        return line


def _intercept(curve: Curve) -> float:
    """What the line through the curve's first two points says of size 0, never negative."""
    if len(curve.points) < 2:
        return 0.0
    (x0, y0), (x1, y1) = curve.points[:2]
    return min(y0, max(0.0, y0 - x0 * (y1 - y0) / (x1 - x0)))


def _context_slopes(contexts: Mapping[int, Mapping[int, float]], base: int) -> dict[int, float]:
    """Seconds that a step of so many requests takes longer for a token more of context in each of them.

    Of lines through what was measured at `base` the one nearest to the rest: a millisecond too many is much
    between contexts that are alike, and little between others.
    """
    found: dict[int, tuple[float, float]] = {}
    for context, steps in contexts.items():
        for batch, seconds in steps.items():
            if context != base and batch in contexts[base]:
                tokens, longer_s = context - base, seconds - contexts[base][batch]
                products, squares = found.get(batch, (0.0, 0.0))
                found[batch] = products + tokens * longer_s, squares + tokens * tokens
    return {batch: max(0.0, products / squares) for batch, (products, squares) in found.items()}
