"""Calls of Llama 3: the answer is `{"name": ..., "parameters": {...}}`, or several with `;` between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.text.tool_calls import rules
from baton.text.tool_calls.parser import Steps, ToolCallParser
from baton.text.tool_calls.rules import Function

_PYTHON_TAG = "<|python_tag|>"


class Llama3Json(ToolCallParser):
    """Nothing marks a call but that the answer begins with one; the tag before it is optional."""

    name = "llama3_json"
    marks = (_PYTHON_TAG,)
    marked = False

    @classmethod
    def grammar(cls, functions: Sequence[Function], mark: Callable[[str], str], *, several: bool) -> str:
        lines = [
            'calls: object ("; " object)*' if several else "calls: object",
            *rules.objects(functions, "parameters"),
            *rules.arguments(functions),
        ]
        return "\n".join(lines)

    def _answer(self) -> Steps[None]:
        separators = ""
        while True:
            before = yield from self._gap(separators)
            before += yield from self._optional(_PYTHON_TAG)
            before += yield from self._gap()
            if not (yield from self._call(before)):
                break
            separators = ";"
        yield from self._rest()
