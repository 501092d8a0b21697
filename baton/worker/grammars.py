"""The grammars that a worker's sequences are held to: compiled off the event loop, kept for the next ones."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baton.errors import InvalidRequest
from baton.grammar.compiler import Compiler, deep_thread
from baton.grammar.constraint import BadGrammar
from baton.grammar.guide import Compiled, Guide

log = logging.getLogger(__name__)

_MAX_KEPT = 64


class Grammars:
    """Makes guides for one model. The thread that compiles comes with the first grammar."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Reads the tokenizer, if there is one: that would hold everything up later."""
        self._thread: ThreadPoolExecutor | None = None
        self._compiled: OrderedDict[str, Compiled] = OrderedDict()
        self._compiler: Compiler | None = None
        if tokenizer.is_file():
            try:
                self._compiler = Compiler(tokenizer, vocab_size, eos_token_ids)
            except BadGrammar as error:
                log.warning("answers cannot be held to grammars: %s", error)

    async def guide(self, grammar: str, start: int) -> Guide:
        """A guide for a sequence whose answer begins with token number `start`.

        Raises:
            InvalidRequest: the grammar cannot be compiled, or the model's tokenizer cannot be used for it.
        """
        if self._compiler is None:
            raise InvalidRequest("this model has no tokenizer that answers can be held to grammars with")
        if self._thread is None:
            self._thread = deep_thread("grammars")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._guide, self._compiler, grammar, start)
        except BadGrammar as error:
            raise InvalidRequest(f"the grammar cannot be compiled: {error}") from error

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _guide(self, compiler: Compiler, grammar: str, start: int) -> Guide:
        """Runs on the thread, which alone touches what is kept."""
        compiled = self._compiled.get(grammar)
        if compiled is None or compiled.spent:
            compiled = self._compiled[grammar] = Compiled(compiler.compile(grammar))
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > _MAX_KEPT:
            self._compiled.popitem(last=False)
        return Guide(compiled, start)
