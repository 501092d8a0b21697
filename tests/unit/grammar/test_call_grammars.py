"""What holds an answer to calls allows every way to write good ones, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from msgspec import convert

from baton.grammar.compiler import Compiler, deep_thread, grammar_of
from baton.openai.schema import ChatRequest
from baton.openai.tools import call_constraint
from baton.text import Tokenizer
from baton.text.tool_calls import FORMATS, literal
from tests.tool_models import model_with_tools

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"]}
PLACE = {**CITY, "$defs": {"City": {"type": "string", "maxLength": 5}}, "additionalProperties": False}
NUMBER = {**CITY, "$defs": {"City": {"type": "integer"}}, "description": 'a ::= "b"'}
# One name begins another, and both schemas call different things the same.
TOOLS = [
    {"type": "function", "function": {"name": name, **given}}
    for name, given in {
        "look": {"parameters": PLACE},
        "look_up": {"parameters": NUMBER},
        "now": {},
    }.items()
]
BERN = '{"city": "Bern"}'
WRITTEN: dict[str, Callable[[str, str], str]] = {
    "hermes": lambda name, given: f'<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>',
    "llama3_json": lambda name, given: f'{{"name": "{name}", "parameters": {given}}}',
    "mistral": lambda name, given: f"[TOOL_CALLS]{name}[ARGS]{given}",
}
JOINED = {"hermes": "\n", "llama3_json": "; ", "mistral": ""}

Allows = Callable[..., bool]


@pytest.fixture(scope="module", params=FORMATS)
def calls(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def allows(calls: str, tmp_path_factory: pytest.TempPathFactory) -> Allows:
    """Whether an answer may be that text, all of it, where a request has these fields."""
    folder = model_with_tools(tmp_path_factory.mktemp("models") / "model", calls)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    compiler = Compiler(folder / "tokenizer.json", 4096, [1])

    def mark(text: str) -> str:
        token_id = tokenizer.special_id(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    def allowed(text: str, **fields: object) -> bool:
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, **fields}
        constraint = call_constraint(convert(body, ChatRequest), FORMATS[calls], mark)
        assert constraint is not None
        with deep_thread("test") as thread:
            matcher = thread.submit(lambda: compiler.compile(grammar_of(constraint))).result()
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return matcher.validate_tokens([*tokens, 1]) == len(tokens) + 1

    return allowed


@pytest.mark.parametrize(
    ("name", "given", "good"),
    [
        ("look", BERN, True),
        ("look", '{\n  "city":"Bern"\n}', True),
        ("look_up", '{"city": 5}', True),
        ("look_up", '{"city": 5, "more": []}', True),
        ("now", "{}", True),
        ("look", '{"city": "Zürich"}', False),
        ("look", '{"city": 5}', False),
        ("look", "{}", False),
        ("look_up", BERN, False),
        ("now", BERN, False),
        ("lo", "{}", False),
    ],
)
def test_a_required_call(allows: Allows, calls: str, name: str, given: str, good: bool) -> None:
    assert allows(WRITTEN[calls](name, given), tool_choice="required") == good


def test_how_many_calls_and_of_which_function(allows: Allows, calls: str) -> None:
    one, two = WRITTEN[calls]("look", BERN), WRITTEN[calls]("now", "{}")
    both = one + JOINED[calls] + two
    named = {"type": "function", "function": {"name": "look"}}
    assert allows(both, tool_choice="required")
    assert not allows(both, tool_choice="required", parallel_tool_calls=False)
    assert allows(one, tool_choice=named)
    assert not allows(two, tool_choice=named) and not allows(both, tool_choice=named)
    assert not allows("", tool_choice="required")


@pytest.mark.parametrize("calls", ["mistral"], indirect=True)
def test_the_older_way_of_mistral(allows: Allows) -> None:
    given = [{"name": "look", "arguments": {"city": "Bern"}}, {"name": "now", "arguments": {}}]
    for gap in ("", " "):
        assert allows(f"[TOOL_CALLS]{gap}{json.dumps(given)}", tool_choice="required")


@pytest.mark.parametrize("calls", ["hermes", "mistral"], indirect=True)
def test_a_call_or_else_json(allows: Allows, calls: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
    assert allows('[1, {"a": 2}]', response_format=schema)
    assert allows(WRITTEN[calls]("look", BERN), response_format=schema)
    assert not allows('{"a": 2}', response_format=schema)
    assert not allows(WRITTEN[calls]("look", "{}"), response_format=schema)
