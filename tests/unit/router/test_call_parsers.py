"""Calls in a model's text: found whole however they arrive, and what is no call stays content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baton.text.tool_calls import (
    FORMATS,
    Arguments,
    Call,
    Content,
    Hermes,
    Llama3Json,
    Mistral,
    ToolCallFormat,
)

Calls = list[tuple[str, str]]
WEATHER = '{"city": "Zürich \\"{old}\\" \\\\", "days": [1, 2.5e3], "at": {"now": null}}'


def read(kind: ToolCallFormat, pieces: Sequence[str]) -> tuple[str, Calls]:
    """The content and the calls, each with its arguments."""
    parser = kind()
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    content, calls = "", []
    for part in parts:
        match part:
            case Content(text):
                content += text
            case Call(name):
                calls.append((name, ""))
            case Arguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, calls


def hermes(calls: Calls) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )


def llama(calls: Calls) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)


def tagged(calls: Calls) -> str:
    return "<|python_tag|>" + llama(calls)


def listed(calls: Calls) -> str:
    objects = (f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
    return f"[TOOL_CALLS] [{', '.join(objects)}]"


def named(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)


def short(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}{arguments}" for name, arguments in calls)


WRITERS = [
    (Hermes, hermes),
    (Llama3Json, llama),
    (Llama3Json, tagged),
    (Mistral, listed),
    (Mistral, named),
    (Mistral, short),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=3)
NAMES = st.from_regex("[a-zA-Z0-9_-]{1,64}", fullmatch=True)
CALLS = st.lists(
    st.tuples(
        NAMES,
        st.builds(
            lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
            OBJECTS,
            st.booleans(),
            st.sampled_from([None, 0, 2]),
        ),
    ),
    min_size=1,
    max_size=3,
)
# What is nearly a call, cut and joined at random.
SCRAPS = st.lists(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
            *(
                '{"name": "f", ',
                '"arguments": ',
                '"parameters": ',
                '{"a": 1}',
                '{"arguments": {}, "name": "g"}',
            ),
            *("{", "}", "[", "]", ",", ";", '"', "\\", " ", "\n", "<", "tool", "f", "é", ":", "'", "null"),
        ]
    )
    | st.text(max_size=5),
    max_size=16,
).map("".join)


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(edges)]


PLACES = st.lists(st.integers(0, 10_000), max_size=12)


@pytest.mark.parametrize(("kind", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", ""))
@given(calls=CALLS, places=PLACES)
@example(calls=[("weather", WEATHER), ("f", "{}")], places=[])
@settings(max_examples=60)
def test_calls_come_out_as_they_were_written(kind, write, calls: Calls, places: list[int]) -> None:
    text = write(calls)
    assert read(kind, cut(text, places)) == ("", calls)
    assert read(kind, list(text)) == ("", calls)


@pytest.mark.parametrize("kind", FORMATS.values(), ids=str)
@given(text=SCRAPS, places=PLACES)
@settings(max_examples=300)
def test_any_text_is_read_alike_however_it_is_cut(kind, text: str, places: list[int]) -> None:
    whole = read(kind, [text])
    assert read(kind, cut(text, places)) == whole
    assert read(kind, list(text)) == whole


@pytest.mark.parametrize("kind", FORMATS.values(), ids=str)
@given(text=SCRAPS)
@settings(max_examples=200)
def test_without_a_call_nothing_is_lost(kind, text: str) -> None:
    content, calls = read(kind, [text])
    assert calls or content == text


@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        # Written in unusual ways.
        (Hermes, '<tool_call>{"arguments":{"b":[2]},"name":"f"}</tool_call>', "", [("f", '{"b": [2]}')]),
        (Hermes, '<tool_call>{"id":"1","name":"f","arguments":{}}', "", [("f", "{}")]),
        (Hermes, '<tool_call>{"name":"f","arguments":{},"id":"1"} </tool_call>', "", [("f", "{}")]),
        (Hermes, '<tool_call>{"name":"f","parameters":{"b":2}}</tool_call>', "", [("f", '{"b":2}')]),
        (Hermes, '<tool_call>{"name":"f","arguments":{"b":2}</tool_call>', "", [("f", '{"b":2}')]),
        (
            Llama3Json,
            '\n{"name":"f","arguments":{}}\n{"name":"g","parameters":{}}',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        (Mistral, '[TOOL_CALLS]f[CALL_ID]a1[ARGS]{"b":2}', "", [("f", '{"b":2}')]),
        (Mistral, '[TOOL_CALLS] f {"b":2}', "", [("f", '{"b":2}')]),
        # With content.
        (Hermes, 'Look:\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n', "Look:", [("f", "{}")]),
        (Hermes, '<tool_call>{"name":"f","arguments":{}}</tool_call>\nDone.', "\nDone.", [("f", "{}")]),
        (Llama3Json, '{"name":"f","parameters":{}}; done', "; done", [("f", "{}")]),
        (Mistral, 'Look: [TOOL_CALLS] [{"name":"f","arguments":{}}]', "Look:", [("f", "{}")]),
        # Cut off.
        (Hermes, '<tool_call>{"name":"f","arguments":{"b":"c\\', "", [("f", '{"b":"c\\')]),
        (Hermes, '<tool_call>{"name":"f","arguments":{}}</tool', "", [("f", "{}")]),
        (Hermes, '<tool_call>{"name":"f","argu', '<tool_call>{"name":"f","argu', []),
        # No calls.
        (Hermes, "<tool_call>f(b=2)</tool_call>", "<tool_call>f(b=2)</tool_call>", []),
        (Hermes, '<tool_call>{"name":2,"arguments":{}}', '<tool_call>{"name":2,"arguments":{}}', []),
        (Hermes, '<tool_call>{"name":"f","arguments":"b"}', '<tool_call>{"name":"f","arguments":"b"}', []),
        (Hermes, '{"name":"f","arguments":{}}', '{"name":"f","arguments":{}}', []),
        (Llama3Json, '{"name":"Ada","born":1815}', '{"name":"Ada","born":1815}', []),
        (Llama3Json, 'So: {"name":"f","parameters":{}}', 'So: {"name":"f","parameters":{}}', []),
        (Llama3Json, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        (Mistral, "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
        (Mistral, "[TOOL_CALLS]no call", "[TOOL_CALLS]no call", []),
        # No call, and then one.
        (
            Hermes,
            '<tool_call>{"name": f}</tool_call><tool_call>{"name":"f","arguments":{}}</tool_call>',
            '<tool_call>{"name": f}</tool_call>',
            [("f", "{}")],
        ),
    ],
)
def test_what_models_make_of_their_formats(
    kind: ToolCallFormat, text: str, content: str, calls: Calls
) -> None:
    assert read(kind, [text]) == read(kind, list(text)) == (content, calls)
