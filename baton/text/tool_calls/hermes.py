"""Calls of Hermes and Qwen 2.5 and 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.text.tool_calls import rules
from baton.text.tool_calls.parser import Steps, ToolCallParser
from baton.text.tool_calls.rules import Function

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolCallParser):
    """A missing end mark is forgiven."""

    name = "hermes"
    marks = (_OPEN, _CLOSE)

    @classmethod
    def grammar(cls, functions: Sequence[Function], mark: Callable[[str], str], *, several: bool) -> str:
        lines = [
            'calls: call ("\\n" call)*' if several else "calls: call",
            f'call: {mark(_OPEN)} "\\n" object "\\n" {mark(_CLOSE)}',
            *rules.objects(functions, "arguments"),
            *rules.arguments(functions),
        ]
        return "\n".join(lines)

    def _answer(self) -> Steps[None]:
        while (yield from self._content_to(_OPEN)):
            gap = yield from self._gap()
            if (yield from self._call(_OPEN + gap)):
                gap = yield from self._gap()
                if not (yield from self._optional(_CLOSE)):
                    self._say(gap)
