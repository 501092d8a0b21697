"""Whether a request's constraint can be kept to: asked of a process of its own, before anything is placed.

Compiling a grammar may take any time and memory, and a deep one the whole process. So it happens where that
ends nothing but the question. What passes is compiled by workers in the same way, within the same limits.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from baton.errors import InvalidRequest, Overloaded
from baton.grammar.constraint import MAX_CHARACTERS, READY, Constraint

log = logging.getLogger(__name__)

_PROGRAM = (sys.executable, "-m", "baton.grammar.checker")
# What a constraint makes of it; else somebody else ended it, perhaps before it was asked.
_TOO_MUCH = (signal.SIGXCPU, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
_MAX_WAITING = 32
_PATIENCE_S = 30.0  # the process has a limit of its own, in seconds of computing
_MAX_ANSWER_BYTES = 64 * MAX_CHARACTERS  # a character outside the alphabet is escaped three times over
_MAX_KEPT_CHARACTERS = 8 * 2**20


class Checker:
    """Checks constraints for one model, one at a time. The process starts with the first one."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._arguments = (str(tokenizer), str(vocab_size), *map(str, eos_token_ids))
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._asked = 0
        self._unanswered = 0
        self._known: OrderedDict[Constraint, tuple[str, str]] = OrderedDict()
        self._kept_characters = 0

    async def grammar(self, constraint: Constraint, field: str) -> str:
        """The constraint in the form that workers take.

        Raises:
            InvalidRequest: it is wrong, too large or too complex; the message begins with `field`.
            Overloaded: too many others wait to be checked.
        """
        if len(constraint.text) + len(constraint.whitespace) > MAX_CHARACTERS:
            raise InvalidRequest(
                f"{field}: at most {MAX_CHARACTERS} characters, got {len(constraint.text)}", field=field
            )
        known = self._known.get(constraint)
        if known is None:
            known = await self._ask_in_turn(constraint)
        else:
            self._known.move_to_end(constraint)
        grammar, refusal = known
        if refusal:
            raise InvalidRequest(f"{field}: {refusal}", field=field)
        return grammar

    async def aclose(self) -> None:
        """End the process, if it was needed."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask_in_turn(self, constraint: Constraint) -> tuple[str, str]:
        if self._waiting >= _MAX_WAITING:
            raise Overloaded(f"{self._waiting} constraints wait to be checked", retry_after_s=1.0)
        self._waiting += 1
        try:
            async with asyncio.timeout(_PATIENCE_S), self._turn:
                known = self._known.get(constraint)
                if known is None:
                    known = await self._ask(constraint)
                    self._remember(constraint, known)
                return known
        except TimeoutError:
            raise Overloaded("the constraint could not be checked in time", retry_after_s=5.0) from None
        finally:
            self._waiting -= 1

    async def _ask(self, constraint: Constraint) -> tuple[str, str]:
        """What the process says, or what it means that it says nothing."""
        for _ in range(2):
            process = self._process
            if process is None or process.stdin is None or process.stdin.is_closing():
                process = await self._start()
            assert process.stdin is not None and process.stdout is not None
            self._asked += 1
            self._unanswered += 1
            asked = True
            try:
                process.stdin.write(constraint.to_line(self._asked))
            except RuntimeError:  # uvloop's, of a pipe that it has closed: the process ended before
                asked = False
            while line := await process.stdout.readline():
                number, grammar, refusal = json.loads(line)
                self._unanswered -= number != READY
                if number == self._asked or (number == READY and refusal):
                    return grammar, refusal
                # Else it is ready, or whoever asked that is gone.
            self._process = None
            status = await process.wait()
            log.warning("the process that checks constraints ended with status %d", status)
            if asked and -status in _TOO_MUCH and self._unanswered == 1:
                return "", "takes too much time or memory to compile; make it simpler"
        raise RuntimeError("the process that checks constraints ends again and again")

    async def _start(self) -> Process:
        self._unanswered = 0
        self._process = await asyncio.create_subprocess_exec(
            *_PROGRAM, *self._arguments, stdin=PIPE, stdout=PIPE, limit=_MAX_ANSWER_BYTES
        )
        return self._process

    def _remember(self, constraint: Constraint, known: tuple[str, str]) -> None:
        self._known[constraint] = known
        self._kept_characters += _size(constraint, known)
        while self._kept_characters > _MAX_KEPT_CHARACTERS:
            self._kept_characters -= _size(*self._known.popitem(last=False))


def _size(constraint: Constraint, known: tuple[str, str]) -> int:
    return len(constraint.text) + len(known[0]) + len(known[1])
