"""How a constraint becomes a grammar, and a grammar a matcher of one model's tokens, within limits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llguidance

from baton.grammar.constraint import BadGrammar, Constraint, Kind

# Grammars are compiled by recursion, and a chain of references as long as the longest text allows takes
# megabytes of stack. Only what is used of it is ever memory.
_STACK_BYTES = 256 * 2**20
_MAX_MESSAGE = 500
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=500_000,
    max_grammar_size=250_000,
    max_lexer_states=30_000,  # 1 to 2 kB each
    precompute_large_lexemes=False,
    verbose_errors=False,
)


def deep_thread(name: str) -> ThreadPoolExecutor:
    """One thread whose stack is deep enough to compile any grammar."""
    executor = ThreadPoolExecutor(1, name)
    before = threading.stack_size(_STACK_BYTES)
    try:
        executor.submit(int).result()  # the thread is there now
    finally:
        threading.stack_size(before)
    return executor


def grammar_of(constraint: Constraint) -> str:
    """The constraint in llguidance's own form, not yet known to be right.

    Raises:
        BadGrammar: it is not what its kind says.
    """
    try:
        if constraint.kind is Kind.JSON:
            return llguidance.LLMatcher.grammar_from_json_schema(
                constraint.text,
                overrides={
                    "whitespace_flexible": bool(constraint.whitespace),
                    "whitespace_pattern": constraint.whitespace or None,
                },
            )
        return llguidance.grammar_from(constraint.kind.value, constraint.text)
    except ValueError as error:
        raise BadGrammar(_short(str(error))) from error


class Compiler:
    """Compiles grammars for one model. Call `compile` on a `deep_thread`."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """
        Args:
            tokenizer: the model's tokenizer.json.
            vocab_size: the logits the model has for each position.
            eos_token_ids: of which one may follow when the grammar accepts.

        Raises:
            BadGrammar: the tokenizer cannot be used for this.
        """
        try:
            self._tokens = llguidance.LLTokenizer(
                tokenizer.read_text(), n_vocab=vocab_size, eos_token=list(eos_token_ids) or None
            )
        except (OSError, ValueError) as error:
            raise BadGrammar(f"the model's tokenizer cannot be used: {_short(str(error))}") from error

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the grammar's start. What there is to compute lazily is shared by its copies.

        Raises:
            BadGrammar: there is no such grammar, nothing matches it, or it is too complex.
        """
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out whether anything may come first
        if matcher.is_error():
            reason = matcher.get_error()
            raise BadGrammar("nothing matches it" if reason.startswith("NoExtension") else _short(reason))
        return matcher


def _short(message: str) -> str:
    message = message.partition("\n<")[0].strip()
    return message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 3]}..."
