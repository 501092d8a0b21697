"""How much may go into the next step, so that those who decode in it get their tokens in time?"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from math import exp, log

from baton.routing.view import Curve

#: Tokens of prompts that any step may hold: one prompt always goes on, however tight the target is.
LEAST_PROMPT_TOKENS = 16

_WEIGHT = 0.05
_MOST = log(8.0)


@dataclass(frozen=True)
class Pace:
    """Bounds the predicted seconds of a step in which sequences decode by `itl_target_s`; 0 bounds nothing.

    The curves are those that the worker measured at its start: `prefill` of one prompt against its tokens,
    `decode` of one step against the requests in it. A step that does both reads the weights once, so it is
    predicted to take as long as the two apart, less a step of one request; times e to the power of
    `log_factor`, learnt from what such steps took: contexts grow, and others use the machine too.
    """

    itl_target_s: float = 0.0
    prefill: Curve = field(default_factory=Curve)
    decode: Curve = field(default_factory=Curve)
    log_factor: float = 0.0

    def learnt(self, decoding: int, prompt_tokens: int, took_s: float, steps: int = 1) -> Pace:
        """The pace, knowing also what each of some steps of `decoding` requests and so many tokens of prompts
        took: one step counts little, and within 1/8 and 8."""
        predicted_s = self._measured_s(decoding, prompt_tokens)
        if not decoding or predicted_s <= 0 or took_s <= 0:
            return self
        off = max(-_MOST, min(_MOST, log(took_s / predicted_s)))
        weight = 1 - (1 - _WEIGHT) ** steps
        return replace(self, log_factor=self.log_factor + weight * (off - self.log_factor))

    def step_s(self, decoding: int, prompt_tokens: int) -> float:
        """Predicted seconds of a step of `decoding` requests and so many tokens of prompts."""
        measured_s = self._measured_s(decoding, prompt_tokens)
        return self.factor * measured_s if decoding else measured_s

    @property
    def factor(self) -> float:
        """What steps take, as a multiple of what was measured at the worker's start."""
        return exp(self.log_factor)

    def _measured_s(self, decoding: int, prompt_tokens: int) -> float:
        decode_s, prefill_s = self.decode.seconds(decoding), self.prefill.seconds(prompt_tokens)
        if not decoding or not prompt_tokens:
            return decode_s + prefill_s
        return max(decode_s, prefill_s, decode_s + prefill_s - self.decode.seconds(1))

    def prompt_tokens(self, decoding: int, most: int) -> int:
        """Tokens of prompts, at most `most`, that may join a step of `decoding` requests.

        Never fewer than `LEAST_PROMPT_TOKENS` of them, or a prompt might wait for ever.
        """
        if not decoding or not self.itl_target_s or self.step_s(decoding, most) <= self.itl_target_s:
            return most
        fits = bisect_right(
            range(1, most), self.itl_target_s, key=lambda tokens: self.step_s(decoding, tokens)
        )
        return min(most, max(fits, LEAST_PROMPT_TOKENS))

    def paced_s(self, decoding: int, prompt_tokens: int) -> float | None:
        """Predicted seconds to compute a prompt in steps that keep to the target with `decoding` requests.

        None where no step that advances the prompt does, or nothing bounds them.
        """
        if not self.itl_target_s:
            return None
        chunk = self.prompt_tokens(decoding, prompt_tokens)
        chunk_s = self.step_s(decoding, chunk)
        return chunk_s * prompt_tokens / chunk if chunk_s <= self.itl_target_s else None

    def decoding(self, most: int) -> int:
        """Requests, at most `most` and at least one, that may decode together."""
        if not self.itl_target_s:
            return most
        fits = bisect_right(range(1, most + 1), self.itl_target_s, key=lambda count: self.step_s(count, 0))
        return max(1, fits)


UNBOUNDED = Pace()
