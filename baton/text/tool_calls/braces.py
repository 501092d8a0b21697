"""Where a JSON object ends in a text that arrives in pieces."""

from __future__ import annotations

import re

_IN_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_BETWEEN = re.compile(r"[\s\w:,.+-]*")


class Braces:
    """Follows strings and brackets, nothing else of JSON: what stands between them is the model's business.

    `at` is how far the text has been looked through; `broken`: it goes on with what JSON never has there.
    """

    def __init__(self, depth: int = 0) -> None:
        """`depth`: how many brackets were open before the text begins."""
        self.at = 0
        self.broken = False
        self._depth = depth
        self._in_string = False

    def end(self, text: str) -> int | None:
        """Where the last bracket is closed, if it is; `text` begins as it did in the call before."""
        while not self.broken:
            between = _IN_STRING if self._in_string else _BETWEEN
            match = between.match(text, self.at)
            assert match is not None, "both match the empty text"
            self.at = match.end()
            if self.at == len(text):
                return None
            if self._in_string and text[self.at] == "\\":
                return None  # what it escapes is still to come
            if self._passes(text[self.at]):
                self.at += 1
                return self.at
        return None

    def taken(self) -> None:
        """The text up to `at` is gone; the next one begins after it."""
        self.at = 0

    def _passes(self, character: str) -> bool:
        """Go past a quote or bracket; whether it closes the last one."""
        if character == '"':
            self._in_string = not self._in_string
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                return True
        else:
            self.broken = True
            return False
        self.at += 1
        return False
