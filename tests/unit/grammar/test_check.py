"""Constraints that are wrong, or made to do harm, are refused by name; the next one is checked as before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from baton.errors import InvalidRequest
from baton.grammar.check import Checker
from baton.grammar.constraint import MAX_CHARACTERS, Constraint, Kind
from baton.worker.grammars import Grammars
from tests.unit.router.fakes import MODEL

GOOD = Constraint(Kind.JSON, '{"type": "object"}')
TOKENIZER = MODEL / "tokenizer.json"


def chain(length: int) -> str:
    """A schema of references, one to the next."""
    links = {str(at): {"properties": {"": {"$ref": f"#/$defs/{at + 1}"}}} for at in range(length)}
    return json.dumps({"$defs": {**links, str(length): {}}, "$ref": "#/$defs/0"}, separators=(",", ":"))


BAD = {
    "type that is none": Constraint(Kind.JSON, '{"type": "banana"}'),
    "no JSON": Constraint(Kind.JSON, '{"type": '),
    "no object": Constraint(Kind.JSON, "[1]"),
    "keyword that cannot be kept to": Constraint(Kind.JSON, '{"type": "array", "uniqueItems": true}'),
    "nothing is allowed": Constraint(Kind.JSON, '{"type": "string", "minLength": 5, "maxLength": 2}'),
    "refers to itself alone": Constraint(Kind.JSON, '{"$ref": "#"}'),
    "refers to elsewhere": Constraint(Kind.JSON, '{"$ref": "file:///etc/passwd"}'),
    "nested deeply": Constraint(Kind.JSON, '{"items":' * 5000 + "{}" + "}" * 5000),
    "too long": Constraint(Kind.REGEX, "a" * (MAX_CHARACTERS + 1)),
    "takes minutes": Constraint(Kind.JSON, '{"type": "integer", "multipleOf": 99999989}'),
    "grows without end": Constraint(
        Kind.GRAMMAR,
        "start: R0\n" + "".join(f"R{at}: R{at + 1} R{at + 1}\n" for at in range(60)) + 'R60: "a"',
    ),
    "looks ahead": Constraint(Kind.REGEX, "(?=a)b"),
    "parentheses": Constraint(Kind.REGEX, "(" * 20_000 + "a" + ")" * 20_000),
    "no grammar": Constraint(Kind.GRAMMAR, "start: nowhere"),
    "bad whitespace": Constraint(Kind.JSON, '{"type": "object"}', whitespace="("),
}


@pytest.fixture
async def checker() -> AsyncIterator[Checker]:
    made = Checker(TOKENIZER, 4096, [1, 6])
    yield made
    await made.aclose()


async def test_a_bad_constraint_is_refused_and_harms_nobody(checker: Checker) -> None:
    for name, constraint in BAD.items():
        with pytest.raises(InvalidRequest) as refused:
            await checker.grammar(constraint, "here")
        assert refused.value.field == "here", name
        assert refused.value.message.startswith("here: ")
        assert len(refused.value.message) < 1000
        assert await checker.grammar(GOOD, "here")


async def test_the_longest_chain_of_references_is_compiled_by_routers_and_workers(checker: Checker) -> None:
    """One frame of the stack, or several, for every link."""
    text = chain(1200)
    assert MAX_CHARACTERS * 0.9 < len(text) <= MAX_CHARACTERS
    grammar = await checker.grammar(Constraint(Kind.JSON, text), "here")
    grammars = Grammars(TOKENIZER, 4096, [1, 6])
    try:
        assert not (await grammars.guide(grammar, 0)).failure
    finally:
        grammars.close()


async def test_a_long_choice_of_strange_characters_comes_back_whole(checker: Checker) -> None:
    texts = [chr(0x1F600 + at % 64) * 100 + str(at) for at in range(600)]
    text = json.dumps(texts, ensure_ascii=False)
    assert await checker.grammar(Constraint(Kind.CHOICE, text), "here")


async def test_whoever_leaves_costs_nobody_an_answer(checker: Checker) -> None:
    asked = [checker.grammar(Constraint(Kind.REGEX, f"a{{{n}}}"), "here") for n in range(1, 6)]
    tasks = [asyncio.ensure_future(one) for one in asked]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[3].cancel()
    await asyncio.wait(tasks)
    for n in (2, 3, 5):
        assert f"a{{{n}}}" in tasks[n - 1].result()
    assert "a{1}" in await checker.grammar(Constraint(Kind.REGEX, "a{1}"), "here")


async def test_whoever_comes_next_is_not_blamed(checker: Checker) -> None:
    """The process ends over a question that nobody waits for any more."""
    await checker.grammar(GOOD, "here")
    asking = asyncio.ensure_future(checker.grammar(BAD["takes minutes"], "here"))
    await asyncio.sleep(0)
    asking.cancel()
    assert await checker.grammar(Constraint(Kind.REGEX, "b{7}"), "here")


async def test_guides_of_one_grammar_do_not_know_each_other() -> None:
    grammars = Grammars(TOKENIZER, 4096, [1, 6])
    with pytest.raises(InvalidRequest):
        await grammars.guide("no grammar at all", 0)
    checker = Checker(TOKENIZER, 4096, [1, 6])
    try:
        grammar = await checker.grammar(Constraint(Kind.CHOICE, '["a", "b"]'), "here")
        one, other = await asyncio.gather(grammars.guide(grammar, 0), grammars.guide(grammar, 0))
        assert not one.complete([9])  # is not allowed
        assert one.failure
        assert not other.failure
        assert not (await grammars.guide(grammar, 0)).failure
    finally:
        grammars.close()
        await checker.aclose()
