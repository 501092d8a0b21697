"""Which functions a chat's answer may or must call, and the grammar that holds it to that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from baton.errors import InvalidRequest
from baton.grammar.constraint import MAX_CHARACTERS, Constraint, Kind
from baton.openai.schema import ChatRequest, ChosenTool, FunctionDefinition, Message
from baton.openai.structured import constraint_of
from baton.text.tool_calls import Function, ToolCallFormat

JsonObject = dict[str, Any]


class _Sent(msgspec.Struct):
    tools: list[JsonObject] | None = None


_as_sent = msgspec.json.Decoder(_Sent)


def tools_as_sent(body: bytes) -> list[JsonObject]:
    """The tools of a body that has been parsed, with their keys in the order that the model sees."""
    return _as_sent.decode(body).tools or []


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
    if may_call(request) and (asked := constraint_of(request)) is not None:
        field = asked[1]
        raise InvalidRequest(
            f"{field}: would rule out calls of the tools; leave {field} out, or set tool_choice to none",
            field=field,
        )


def check_messages(messages: list[Message]) -> None:
    """
    Raises:
        InvalidRequest: a message has calls, or answers one, and is none that can.
    """
    for at, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            field = f"messages[{at}].tool_calls"
            raise InvalidRequest(f"{field}: only an assistant calls tools", field=field)
        if (message.tool_call_id is not None) != (message.role == "tool"):
            field = f"messages[{at}].tool_call_id"
            raise InvalidRequest(f"{field}: goes with role tool, and only with it", field=field)


def call_constraint(request: ChatRequest, calls: ToolCallFormat, mark: Callable[[str], str]) -> Constraint:
    """What holds the answer to the calls it must be; `mark` says how the format's marks are written."""
    functions = [Function(tool.name, _schema(tool)) for _, tool in _callable(request)]
    several = request.tool_choice == "required" and request.parallel_tool_calls is not False
    return Constraint(Kind.LARK, calls.grammar(functions, mark, several=several))


def argument_constraints(request: ChatRequest) -> Iterator[tuple[Constraint, str]]:
    """What each function's arguments must be, and the field that says so: to find the one that cannot be kept
    to."""
    for field, tool in _callable(request):
        yield Constraint(Kind.JSON, _schema(tool)), field


def _callable(request: ChatRequest) -> Iterator[tuple[str, FunctionDefinition]]:
    for at, tool in enumerate(request.tools or ()):
        choice = request.tool_choice
        if not isinstance(choice, ChosenTool) or choice.function.name == tool.function.name:
            yield f"tools[{at}].function.parameters", tool.function


def _schema(tool: FunctionDefinition) -> str:
    schema: JsonObject = {"type": "object", "additionalProperties": False}
    if tool.parameters is not None:
        schema = {**tool.parameters, "type": "object"}
    # Blanks as in other constraints.
    schema["x-guidance"] = {"whitespace_flexible": True, "whitespace_pattern": Constraint.whitespace}
    return msgspec.json.encode(schema).decode()


def _check_parameters(tool: FunctionDefinition, field: str) -> None:
    if tool.parameters is None:
        return
    kind = tool.parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequest(f"{field}: must be the schema of an object", field=field)
    try:
        size = len(msgspec.json.encode(tool.parameters))
    except RecursionError as error:
        raise InvalidRequest(f"{field}: nested too deeply", field=field) from error
    if size > MAX_CHARACTERS:
        raise InvalidRequest(f"{field}: at most {MAX_CHARACTERS} bytes, got {size}", field=field)
