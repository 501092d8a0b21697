"""Which constraint a request puts on its answer, by whichever of its fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from baton.errors import InvalidRequest
from baton.grammar.constraint import Constraint, Kind
from baton.openai.schema import RequestFields, ResponseFormat, SamplingFields, StructuredOutputs

_ANY_OBJECT = '{"type":"object"}'


def constraint_of(fields: SamplingFields) -> tuple[Constraint, str] | None:
    """The constraint and the name of the field that puts it; None where any answer will do.

    Raises:
        InvalidRequest: there are several, or the field lacks what it needs.
    """
    asked = list(_asked(fields))
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(field for _, _, field in asked)
        raise InvalidRequest(
            f"{asked[1][2]}: only one constraint is possible, got {names}", field=asked[1][2]
        )
    kind, text, field = asked[0]
    whitespace = _whitespace(fields)
    constraint = Constraint(kind, text) if whitespace is None else Constraint(kind, text, whitespace)
    return constraint, field


def _asked(fields: SamplingFields) -> Iterator[tuple[Kind, str, str]]:
    """Each constraint: its kind, its text and the field."""
    if fields.structured_outputs is not None:
        yield from _structured(fields.structured_outputs, "structured_outputs.")
    if isinstance(fields, RequestFields):
        if fields.response_format is not None:
            yield from _response_format(fields.response_format)
        older = StructuredOutputs(
            json=fields.guided_json,
            regex=fields.guided_regex,
            choice=fields.guided_choice,
            grammar=fields.guided_grammar,
        )
        yield from _structured(older, "guided_")


def _structured(asked: StructuredOutputs, prefix: str) -> Iterator[tuple[Kind, str, str]]:
    if asked.json is not None:
        yield Kind.JSON, _text(asked.json, f"{prefix}json"), f"{prefix}json"
    if asked.json_object:
        yield Kind.JSON, _ANY_OBJECT, f"{prefix}json_object"
    if asked.regex is not None:
        yield Kind.REGEX, asked.regex, f"{prefix}regex"
    if asked.choice is not None:
        yield Kind.CHOICE, _text(asked.choice, f"{prefix}choice"), f"{prefix}choice"
    if asked.grammar is not None:
        yield Kind.GRAMMAR, asked.grammar, f"{prefix}grammar"


def _response_format(asked: ResponseFormat) -> Iterator[tuple[Kind, str, str]]:
    given = asked.json_schema
    if (given is not None) != (asked.type == "json_schema"):
        field = "response_format.json_schema"
        raise InvalidRequest(f"{field}: goes with type json_schema, and only with it", field=field)
    if asked.type == "json_object":
        yield Kind.JSON, _ANY_OBJECT, "response_format"
    if given is not None:
        field = "response_format.json_schema.schema"
        yield Kind.JSON, _text(given.schema, field), field


def _whitespace(fields: SamplingFields) -> str | None:
    """What may stand between the parts of JSON, if the request says so; empty: nothing."""
    asked = fields.structured_outputs
    if asked is not None and asked.disable_any_whitespace:
        return ""
    if asked is not None and asked.whitespace_pattern:
        return asked.whitespace_pattern
    return (fields.guided_whitespace_pattern or None) if isinstance(fields, RequestFields) else None


def _text(value: str | dict[str, Any] | list[str], field: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError as error:
        raise InvalidRequest(f"{field}: nested too deeply", field=field) from error
