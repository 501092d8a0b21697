"""What a request wants its answer to look like, as it says it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum

MAX_CHARACTERS = 65_536
"""Of a constraint's text; what compiling one may take is limited too, see `baton.grammar.check`."""


class Kind(Enum):
    """What a constraint's text is."""

    JSON = "json"  # a JSON schema
    REGEX = "regex"  # a regular expression that the whole answer matches
    CHOICE = "choice"  # a JSON list of strings, one of which is the answer
    GRAMMAR = "grammar"  # a context-free grammar, in Lark's notation or in GBNF
    LARK = "lark"  # one in Lark's notation, whatever it looks like


@dataclass(frozen=True)
class Constraint:
    """`whitespace` is a regular expression of what may stand between the parts of JSON; empty: nothing."""

    kind: Kind
    text: str
    whitespace: str = r"[ \n\r\t]{1,32}"  # pretty-printed or not, and no model loses itself in blanks

    def to_line(self, number: int) -> bytes:
        """As it travels to the process that checks it."""
        return json.dumps([number, self.kind.value, self.text, self.whitespace]).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> tuple[int, Constraint]:
        number, kind, text, whitespace = json.loads(line)
        return number, cls(Kind(kind), text, whitespace)


READY = 0
"""The number of the first line that this process answers with; those of constraints are higher."""


class BadGrammar(Exception):
    """The constraint cannot be kept to; the message says why."""
