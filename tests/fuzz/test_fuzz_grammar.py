"""Whatever is asked of an answer, it becomes a grammar or a refusal that names the field."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.grammar.check import Checker
from baton.grammar.constraint import Constraint, Kind
from tests.fuzz.explore import explore
from tests.fuzz.mutations import mutated
from tests.unit.router.fakes import MODEL

CONSTRAINTS = [
    b'json{"type":"object","properties":{"a":{"$ref":"#/$defs/b"}},"required":["a"],"$defs":{"b":{"type":"null"}}}',
    b'json{"anyOf":[{"type":"string","pattern":"^a{2,5}$","maxLength":9},{"enum":[1,"x",null,2.5]}]}',
    b'json{"type":"array","prefixItems":[{"type":"number","multipleOf":0.5}],"items":{"minimum":3},"maxItems":4}',
    rb"regex(a|b{3,900})*[^\]\x00-\x1f]\d+(\p{L}|.)?$",
    b'choice["yes","no","\\u00e9\\n"]',
    b'grammarstart: a | B\na: "x" a? B{1,3}\nB: /[0-9]+/ & /.*7/\n%ignore /[ ]+/',
    b'grammarroot ::= "a" (item ",")* [^x]\nitem ::= [a-z]+ | root',
]
_asked: list[tuple[asyncio.Runner, Checker]] = []


@pytest.fixture(scope="module", autouse=True)
def checker() -> Iterator[None]:
    with asyncio.Runner() as runner:
        made = Checker(MODEL / "tokenizer.json", 4096, [1, 6])
        _asked.append((runner, made))
        yield
        _asked.clear()
        runner.run(made.aclose())


@explore(examples=40, content=mutated(CONSTRAINTS), whitespace=st.sampled_from(["", " ?", "[ ", "(a+)+"]))
def test_any_constraint_becomes_a_grammar_or_a_refusal(content: bytes, whitespace: str) -> None:
    text = content.decode("utf-8", "replace")
    kind = next((kind for kind in Kind if text.startswith(kind.value)), Kind.JSON)
    runner, made = _asked[0]
    try:
        grammar = runner.run(
            made.grammar(Constraint(kind, text.removeprefix(kind.value), whitespace), "here")
        )
        assert grammar
    except InvalidRequest as refusal:
        assert refusal.field == "here"
        assert len(refusal.message) < 1000
