"""A model is told of tools, calls and their results as transformers would tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer

from baton.config import ModelSettings
from baton.openai.schema import Message
from baton.text import ChatTemplate
from baton.text.tool_calls import format_of
from services.router.model import ServedModel
from tests.tool_models import HERMES, MODEL, TEMPLATES, model_with_tools

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Today\'s weather, "as it is" – <b>',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    {"function": {"strict": None, "parameters": {}, "name": "now"}, "type": "function"},
]
ARGUMENTS = {"city": "Zürich", "days": 2}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "a1b2c3d4e",
                "type": "function",
                "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": '{"degrees": 21}'},
]


def as_vllm_has_them() -> list[dict[str, Any]]:
    """The messages that templates get: no content is empty, and arguments are what their JSON says."""
    messages = json.loads(json.dumps(MESSAGES))
    messages[1]["content"] = ""
    messages[1]["tool_calls"][0]["function"]["arguments"] = ARGUMENTS
    return messages


def rendered(model: ServedModel, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    given = msgspec.convert(messages, list[Message])
    return model.render(given, add_generation_prompt=True, variables=None, tools=tools)


@pytest.mark.parametrize("calls", TEMPLATES)
def test_as_transformers_does_it(tmp_path: Path, calls: str) -> None:
    folder = model_with_tools(tmp_path / "model", calls)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = ServedModel.load(ModelSettings(model=str(folder)), "auto")
    assert ours.calls is not None and ours.calls.name == calls
    for tools in (TOOLS, []):
        expected = theirs.apply_chat_template(
            as_vllm_has_them(), tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        assert rendered(ours, MESSAGES, tools) == expected
        assert ("as it is" in expected) == bool(tools)


def test_arguments_that_are_no_json_stay_as_they_were(tmp_path: Path) -> None:
    model = ServedModel.load(ModelSettings(model=str(model_with_tools(tmp_path / "model", "hermes"))), "auto")
    messages = json.loads(json.dumps(MESSAGES))
    for written, shown in [('{"a": ', '"{\\"a\\": "'), ("[1]", '"[1]"'), ("", "{}"), ("[" * 99_999, '"[[[')]:
        messages[1]["tool_calls"][0]["function"]["arguments"] = written
        assert f'"arguments": {shown}' in rendered(model, messages, [])


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": HERMES}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None and template.takes_tools
    assert template.render([]) == "plain"
    assert template.render([], tools=TOOLS).startswith("[system]")


def test_which_templates_take_tools() -> None:
    for source in TEMPLATES.values():
        assert ChatTemplate(source, {}).takes_tools
    bundled = ChatTemplate.load(MODEL)
    assert bundled is not None and not bundled.takes_tools
    assert not ChatTemplate("{# tools #}no tools{% set tools = 1 %}{{ tools }}", {}).takes_tools


@pytest.mark.parametrize(
    ("setting", "template", "calls"),
    [
        *(("auto", source, name) for name, source in TEMPLATES.items()),
        ("auto", "{{ tools }}<tool_call><function=name>", None),
        ("auto", '{{ tools }}<tool_call>name<arg_key>{% for key in call["arguments"] %}', None),
        ("auto", "{{ tools }}", None),
        ("none", HERMES, None),
        ("mistral", HERMES, "mistral"),
    ],
)
def test_the_template_says_how_calls_are_written(setting: str, template: str, calls: str | None) -> None:
    found = format_of(setting, template)
    assert (found and found.name) == calls
