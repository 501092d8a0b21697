"""Which functions a chat's answer may or must call, and the grammar that holds it to that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from baton.errors import InvalidRequest
from baton.grammar.constraint import MAX_CHARACTERS, Constraint, Kind
from baton.openai.schema import ChatRequest, ChosenTool, FunctionDefinition
from baton.openai.structured import constraint_of
from baton.text.tool_calls import Function, ToolCallFormat

JsonObject = dict[str, Any]


class _Sent(msgspec.Struct):
    tools: list[JsonObject] | None = None


_as_sent = msgspec.json.Decoder(_Sent)


def tools_as_sent(body: bytes) -> list[JsonObject]:
    """The tools of a body that has been parsed, with their keys in the order that the model sees.

    Raises:
        InvalidRequest: they are nested so deeply that parsing them once more fails.
    """
    try:
        return _as_sent.decode(body).tools or []
    except RecursionError as error:
        raise _too_deep("tools") from error


def may_call(request: ChatRequest) -> bool:
    """Whether calls are looked for in the answer."""
    return bool(request.tools) and request.tool_choice != "none"


def must_call(request: ChatRequest) -> bool:
    """Whether the answer is nothing but calls."""
    return request.tool_choice == "required" or isinstance(request.tool_choice, ChosenTool)


def check_tools(request: ChatRequest) -> None:
    """
    Raises:
        InvalidRequest: naming the field at fault.
    """
    names: set[str] = set()
    for at, tool in enumerate(request.tools or ()):
        field = f"tools[{at}].function"
        if tool.function.name in names:
            raise InvalidRequest(
                f"{field}.name: {tool.function.name!r} is the name of another tool", field=f"{field}.name"
            )
        names.add(tool.function.name)
        _check_parameters(tool.function, f"{field}.parameters")
    choice = request.tool_choice
    if must_call(request) and not names:
        raise InvalidRequest("tool_choice: needs tools to choose from", field="tool_choice")
    if isinstance(choice, ChosenTool) and choice.function.name not in names:
        field = "tool_choice.function.name"
        raise InvalidRequest(f"{field}: {choice.function.name!r} is none of the tools", field=field)


def call_constraint(
    request: ChatRequest, calls: ToolCallFormat, mark: Callable[[str], str]
) -> Constraint | None:
    """What holds the answer to calls, or also to the JSON it has to be without one; None: it may be anything.

    `mark` says how the format's marks are written.

    Raises:
        InvalidRequest: the answer has to be something that no call can be told apart from.
    """
    answer = constraint_of(request)
    if not must_call(request) and answer is None:
        return None
    functions = [Function(tool.name, _schema(tool, field)) for field, tool in _callable(request)]
    several = not isinstance(request.tool_choice, ChosenTool) and request.parallel_tool_calls is not False
    rules = [calls.grammar(functions, mark, several=several)]
    if answer is None:
        rules.append("start: calls")
    else:
        constraint, field = answer
        if must_call(request) or constraint.kind is not Kind.JSON or not calls.marked:
            raise InvalidRequest(
                f"{field}: would rule out calls of the tools; leave it out, or set tool_choice to none",
                field=field,
            )
        rules += ["start: calls | answer", f"answer: %json {_with_blanks(constraint, field)}"]
    return Constraint(Kind.LARK, "\n".join(rules))


def parts_of(request: ChatRequest) -> Iterator[tuple[Constraint, str]]:
    """What `call_constraint` is made of, and the field of each: to find the one that cannot be kept to."""
    if (answer := constraint_of(request)) is not None:
        yield answer
    for field, tool in _callable(request):
        yield Constraint(Kind.JSON, _schema(tool, field)), field


def _callable(request: ChatRequest) -> Iterator[tuple[str, FunctionDefinition]]:
    for at, tool in enumerate(request.tools or ()):
        choice = request.tool_choice
        if not isinstance(choice, ChosenTool) or choice.function.name == tool.function.name:
            yield f"tools[{at}].function.parameters", tool.function


def _schema(tool: FunctionDefinition, field: str) -> str:
    schema: JsonObject = {"type": "object", "additionalProperties": False}
    if tool.parameters is not None:
        schema = {**tool.parameters, "type": "object"}
    return _with_blanks(Constraint(Kind.JSON, _json(schema, field)), field)


def _with_blanks(constraint: Constraint, field: str) -> str:
    """The schema of a constraint, which says itself what may stand between the parts of JSON."""
    try:
        schema = json.loads(constraint.text)
        if isinstance(schema, dict):
            schema["x-guidance"] = {
                "whitespace_flexible": bool(constraint.whitespace),
                "whitespace_pattern": constraint.whitespace or None,
            }
        return json.dumps(schema)
    except ValueError as error:
        raise InvalidRequest(f"{field}: not valid JSON: {error}", field=field) from error
    except RecursionError as error:
        raise _too_deep(field) from error


def _json(schema: JsonObject, field: str) -> str:
    try:
        return msgspec.json.encode(schema).decode()
    except RecursionError as error:
        raise _too_deep(field) from error


def _too_deep(field: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: nested too deeply", field=field)


def _check_parameters(tool: FunctionDefinition, field: str) -> None:
    if tool.parameters is None:
        return
    kind = tool.parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequest(f"{field}: must be the schema of an object", field=field)
    size = len(_json(tool.parameters, field).encode())
    if size > MAX_CHARACTERS:
        raise InvalidRequest(f"{field}: at most {MAX_CHARACTERS} bytes, got {size}", field=field)
