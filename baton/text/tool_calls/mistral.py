"""Calls of Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]` or `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence

from baton.text.tool_calls import rules
from baton.text.tool_calls.parser import Steps, ToolCallParser
from baton.text.tool_calls.rules import Function, literal

_MARK, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAMED = re.compile(r"([\w.-]{1,256})(?:\[CALL_ID\]\w{0,64})?(?:\[ARGS\])?\s{0,64}(?=\{)")
_MAY_BE_NAMED = re.compile(r"[\w.\-\[\]\s]{0,400}")  # holds every beginning of what `_NAMED` matches


class Mistral(ToolCallParser):
    """Both forms, whichever the model writes."""

    name = "mistral"
    marks = (_MARK, _ARGS, _CALL_ID)

    @classmethod
    def new_id(cls) -> str:
        """Nine letters and digits: the model's templates refuse any other."""
        return uuid.uuid4().hex[:9]

    @classmethod
    def grammar(cls, functions: Sequence[Function], mark: Callable[[str], str], *, several: bool) -> str:
        either = " | ".join(
            f"{literal(function.name)} {mark(_ARGS)}? arguments_{at}" for at, function in enumerate(functions)
        )
        more = '("," " "? object)*' if several else ""
        lines = [
            "calls: listed | named+" if several else "calls: listed | named",
            f'listed: {mark(_MARK)} " "? "[" object {more} "]"',
            f"named: {mark(_MARK)} ({either})",
            *rules.objects(functions, "arguments"),
            *rules.arguments(functions),
        ]
        return "\n".join(lines)

    def _answer(self) -> Steps[None]:
        while (yield from self._content_to(_MARK)):
            gap = yield from self._gap()
            found = self._listed(gap) if self._text.startswith("[") else self._named(gap)
            yield from found

    def _listed(self, gap: str) -> Steps[None]:
        before = _MARK + gap + (yield from self._gap("["))
        while (yield from self._call(before)):
            before = yield from self._gap(",")
            if self._text.startswith("]"):
                self._take(1)
                return

    def _named(self, gap: str) -> Steps[None]:
        while (match := _NAMED.match(self._text)) is None:
            if self._ended or not _MAY_BE_NAMED.fullmatch(self._text):
                self._say(_MARK + gap)
                return
            yield
        self._take(match.end())
        yield from self._call_of(match[1])
