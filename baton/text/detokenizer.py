"""How a stream of tokens becomes a stream of text that never splits a character."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence

from baton.text.tokenizer import Tokenizer

# A character is at most four bytes, so four single-byte tokens; more that still decode to nothing
# valid are not the beginning of one.
_MOST_PENDING_TOKENS = 8
# Enough of the prompt for a decoder that treats the start of a text specially (SentencePiece drops
# a leading space there) to see that the output is not one.
_CONTEXT_TOKENS = 6


class Detokenizer(ABC):
    """One choice's tokens to text, in order. Not shared between choices."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: possibly none, never part of a character."""

    @abstractmethod
    def flush(self) -> str:
        """What is left at the end; a character that was never completed becomes U+FFFD."""

    @staticmethod
    def create(
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        shown: frozenset[int] = frozenset(),
    ) -> Detokenizer:
        """The right one for `tokenizer`; with None every text is empty. `shown` tokens are never skipped."""
        if tokenizer is None:
            return _Silent()
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        if shown:
            skipped -= shown
        if tokenizer.byte_level:
            return _ByteLevel(tokenizer, skipped)
        return _Window(tokenizer, skipped, prompt_token_ids[-_CONTEXT_TOKENS:])


class _Silent(Detokenizer):
    """For a model without a tokenizer."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class _ByteLevel(Detokenizer):
    """For byte-level BPE, where a token's bytes do not depend on its neighbours."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class _Window(Detokenizer):
    """For every other tokenizer: decode a short window and emit what it grew by.

    `_ids[:_read]` has been emitted, as the text the decoder gives it when asked for
    `_ids[_start:_read]`; decoding from `_start` lets the decoder see the left neighbour.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids = [token_id for token_id in context if token_id not in skipped]
        self._start = 0
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        return self._advance(give_up=len(self._ids) - self._read >= _MOST_PENDING_TOKENS)

    def flush(self) -> str:
        return self._advance(give_up=True)

    def _advance(self, *, give_up: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if not give_up and (len(after) <= len(before) or after.endswith("�")):
            return ""
        del self._ids[: self._start]
        self._start = self._read - self._start
        self._read = len(self._ids)
        # After giving up on bytes that are no character, they must not spoil what follows them.
        if give_up:
            self._start = self._read
        return after[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
