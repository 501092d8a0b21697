"""Where one answer stands in its grammar: which tokens may come next, and whether it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llguidance


@dataclass
class Compiled:
    """A grammar that is ready. It is `spent` when what it may remember is used up: compile it anew."""

    matcher: llguidance.LLMatcher
    spent: bool = False


class Guide:
    """Follows the tokens of one sequence from number `start` on; its state is a function of them alone.

    Tokens are taken in when they matter, wherever they come from: sampled here, sampled by another worker, or
    sent again after a failure. Once `failure` says why, nothing more is known.
    """

    def __init__(self, compiled: Compiled, start: int) -> None:
        self.failure = ""
        self._compiled = compiled
        self._matcher = compiled.matcher.deep_copy()
        self._next = start

    def complete(self, tokens: Sequence[int]) -> bool:
        """Whether the grammar is fulfilled by `tokens`, and nothing may follow."""
        self._follow(tokens)
        return not self.failure and self._matcher.is_stopped()

    def fill(self, tokens: Sequence[int], address: int, size: int) -> None:
        """Write what may follow `tokens` to memory: one bit for each token id, the lowest bits first.

        `size` is in bytes, a multiple of 4 that has room for all ids. After a failure everything may follow.
        """
        self._follow(tokens)
        if not self.failure:
            self._matcher.unsafe_compute_mask_ptr(address, size)
            self._note()

    def _follow(self, tokens: Sequence[int]) -> None:
        fresh = tokens[self._next :]
        if fresh and not self.failure:
            self._next += len(fresh)
            self._matcher.consume_tokens(list(fresh))
            self._note()

    def _note(self) -> None:
        if self._matcher.is_error():
            self._compiled.spent = True
            # Not the error itself, which may hold what the answer says.
            self.failure = f"the answer can no longer be held to its grammar: {self._matcher.stop_reason()}"
