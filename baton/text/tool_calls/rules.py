"""The Lark rules that all formats of calls share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple


class Function(NamedTuple):
    """What may be called: its name, and the JSON schema of its arguments, as JSON."""

    name: str
    schema: str


def literal(text: str) -> str:
    """`text` as it is written in a grammar."""
    return json.dumps(text, ensure_ascii=False)


def arguments(functions: Sequence[Function]) -> list[str]:
    """Rules arguments_0, arguments_1, ...; each schema's references are its own."""
    return [f"arguments_{at}: %json {function.schema}" for at, function in enumerate(functions)]


def objects(functions: Sequence[Function], key: str) -> list[str]:
    """The rule object: one function's name, and under `key` its arguments."""
    opening = [
        literal(f'{{"name": {json.dumps(function.name)}, {json.dumps(key)}: ') for function in functions
    ]
    either = " | ".join(f'{text} arguments_{at} "}}"' for at, text in enumerate(opening))
    return [f"object: {either}"]
