"""The process that compiles constraints for the router, where a hostile one does no harm.

`baton.grammar.check` starts it and asks: a line for each constraint, and a line for each answer. A constraint
that takes too much time, memory or stack ends the process.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import psutil

from baton.grammar.compiler import Compiler, deep_thread, grammar_of
from baton.grammar.constraint import READY, BadGrammar, Constraint

_CPU_S = 2
_MEMORY_BYTES = 512 * 2**20


def main() -> None:
    """Arguments: tokenizer.json, the size of the vocabulary, the ids that end an answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the router's; this ends when its input does
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)
    with deep_thread("check") as thread:
        thread.submit(_serve).result()


def _serve() -> None:
    tokenizer, vocab_size, *eos_token_ids = sys.argv[1:]
    try:
        compiler = Compiler(Path(tokenizer), int(vocab_size), [int(token) for token in eos_token_ids])
    except BadGrammar as error:
        _answer(READY, "", str(error))
        return
    _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + _MEMORY_BYTES)
    _answer(READY, "", "")
    for line in sys.stdin.buffer:
        number, constraint = Constraint.from_line(line)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + _CPU_S)
        try:
            grammar = grammar_of(constraint)
            compiler.compile(grammar)
            _answer(number, grammar, "")
        except BadGrammar as error:
            _answer(number, "", str(error))


def _answer(number: int, grammar: str, refusal: str) -> None:
    print(json.dumps([number, grammar, refusal]), flush=True)


def _limit(what: int, most: int) -> None:
    resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


if __name__ == "__main__":
    main()
