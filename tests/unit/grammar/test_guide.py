"""Whatever a model prefers, a guided answer keeps to its constraint, however its tokens come to be there."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.device import HostDevice
from baton.engine.guided import forbidden
from baton.engine.sampler import Sampled, Sampler
from baton.engine.sequence import Sequence as Choice
from baton.grammar.compiler import Compiler, deep_thread, grammar_of
from baton.grammar.constraint import Constraint, Kind
from baton.grammar.guide import Compiled, Guide
from baton.models.config import read_config
from baton.sampling import Sampling
from baton.text import Tokenizer
from tests.unit.router.fakes import MODEL

CONFIG = read_config(MODEL, 0)
EOS = CONFIG.eos_token_ids
VOCAB = CONFIG.vocab_size
DEVICE = HostDevice(torch.device("cpu"))
PROMPT = [5, 6, 7]
_MAX_TOKENS = 1500


@cache
def compiled(kind: Kind, text: str) -> Compiled:
    def compile_it() -> Compiled:
        compiler = Compiler(MODEL / "tokenizer.json", VOCAB, EOS)
        return Compiled(compiler.compile(grammar_of(Constraint(kind, text))))

    with deep_thread("test") as thread:
        return thread.submit(compile_it).result()


@cache
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(MODEL)
    assert loaded is not None
    return loaded


def sequence(guide: Guide | None, output: list[int] | None = None, **sampling: Any) -> Choice:
    return Choice(
        key=0,
        request_id="r",
        tokens=[*PROMPT, *(output or [])],
        prompt_len=len(PROMPT),
        sampling=Sampling(max_tokens=_MAX_TOKENS, **sampling),
        root=bytes(16),
        block_size=16,
        guide=guide,
    )


def draw(logits: torch.Tensor, choices: list[Choice]) -> list[Sampled]:
    rows = Sampler(EOS, DEVICE).sample(logits.clone(), choices)
    return rows.read(rows.tensors)


def answer(kind: Kind, text: str, seed: int) -> list[int]:
    """The tokens of a guided model that has no idea."""
    logits = torch.Generator().manual_seed(seed)
    choice = sequence(Guide(compiled(kind, text), len(PROMPT)), seed=seed)
    assert choice.guide is not None
    while not choice.guide.complete(choice.tokens):
        assert not choice.guide.failure
        assert choice.output_len < _MAX_TOKENS
        token = draw(torch.randn(1, VOCAB, generator=logits) * 3, [choice])[0].token_id
        choice.append(token)
    return choice.tokens[len(PROMPT) :]


def text_of(output: list[int]) -> str:
    return tokenizer().decode(output, skip_special_tokens=True)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    texts = st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 6)})
    patterns = st.sampled_from(["^[a-c]{1,3}$", "^(ab|é)+x$", "^[0-9]{3}-[0-9]{2}$"])
    bounds = st.tuples(st.integers(-9999, 9999), st.integers(0, 9999))
    leaves = st.one_of(
        texts,
        patterns.map(lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 12}),
        bounds.map(lambda at: {"type": "integer", "minimum": at[0], "maximum": at[0] + at[1]}),
        st.just({"type": ["boolean", "null"]}),
        st.lists(st.integers(0, 99) | st.text(max_size=5), min_size=1, max_size=4).map(
            lambda values: {"enum": values}
        ),
    )

    def larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        named = st.dictionaries(st.sampled_from(["a", "b b", "ü", 'q"']), inner, max_size=3)
        objects = named.flatmap(
            lambda properties: st.sets(st.sampled_from([*properties, "a"])).map(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": sorted(required & properties.keys()),
                    "additionalProperties": False,
                }
            )
        )
        arrays = inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 3})
        return objects | arrays | st.lists(inner, min_size=1, max_size=2).map(lambda of: {"anyOf": of})

    return st.recursive(leaves, larger, max_leaves=6)


@settings(max_examples=40)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_an_answer_is_json_that_its_schema_allows(schema: dict[str, Any], seed: int) -> None:
    written = text_of(answer(Kind.JSON, json.dumps(schema), seed))
    jsonschema.validate(json.loads(written), schema)


@settings(max_examples=15)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_an_answer_that_is_resumed_anywhere_may_go_on_as_before(schema: dict[str, Any], seed: int) -> None:
    """As after a worker's death: its tokens come to another guide all at once."""
    text = json.dumps(schema)
    output = answer(Kind.JSON, text, seed)
    followed = Guide(compiled(Kind.JSON, text), len(PROMPT))
    for at in range(0, len(output), max(1, len(output) // 7)):
        resumed = Guide(compiled(Kind.JSON, text), len(PROMPT))
        masks = [forbidden([sequence(guide, output[:at])], VOCAB, DEVICE)[0] for guide in (followed, resumed)]
        assert torch.equal(*masks)
        assert not masks[0][output[at]]
    assert not followed.failure
    assert followed.complete([*PROMPT, *output])


def test_regular_expressions_choices_and_grammars() -> None:
    for seed in range(5):
        assert re.fullmatch(r"[a-f]{2}(x|yy)\d", text_of(answer(Kind.REGEX, r"[a-f]{2}(x|yy)[0-9]", seed)))
        assert text_of(answer(Kind.CHOICE, '["yes", "no", "d\\"é\\n"]', seed)) in ("yes", "no", 'd"é\n')
        lark = 'start: "(" start ")" | /[a-z]{1,3}/'
        gbnf = 'root ::= "(" root ")" | [a-z] [a-z]? [a-z]?'
        for notation in (lark, gbnf):
            assert re.fullmatch(r"(\()*[a-z]{1,3}(\))*", text_of(answer(Kind.GRAMMAR, notation, seed)))


def test_only_what_completes_the_grammar_ends_the_answer() -> None:
    """The end may come where the grammar accepts, and nowhere else."""
    guide = Guide(compiled(Kind.REGEX, "[ab]{2,3}"), len(PROMPT))
    choice = sequence(guide)
    for letter, may_end, complete in (("a", False, False), ("b", True, False), ("a", None, True)):
        choice.tokens += tokenizer().encode(letter, add_special_tokens=False)
        assert guide.complete(choice.tokens) is complete
        if may_end is not None:
            assert all(mask != may_end for mask in forbidden([choice], VOCAB, DEVICE)[0][list(EOS)])


def test_a_token_that_is_not_allowed_fails_the_guide_alone() -> None:
    grammar = compiled(Kind.REGEX, "[ab]{2,3}")
    guide = Guide(grammar, len(PROMPT))
    choice = sequence(guide, [tokenizer().encode("z", add_special_tokens=False)[0]])
    assert not guide.complete(choice.tokens)
    assert guide.failure
    assert not forbidden([choice], VOCAB, DEVICE).any()
    assert grammar.spent
    assert not Guide(grammar, len(PROMPT)).complete(PROMPT)


def test_rows_beside_a_guided_one_keep_every_bit() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(3)) * 4
    plain = [sequence(None, seed=row, logprobs=3) for row in range(6)]
    alone = draw(logits, plain)
    mixed = list(plain)
    for row in (1, 4):
        guide = Guide(compiled(Kind.CHOICE, '["yes", "no"]'), len(PROMPT))
        mixed[row] = sequence(guide, seed=row, logprobs=3)
    together = draw(logits, mixed)
    assert [together[row] for row in (0, 2, 3, 5)] == [alone[row] for row in (0, 2, 3, 5)]
    assert all(text_of([together[row].token_id]) in ("y", "ye", "yes", "n", "no") for row in (1, 4))
    for row in (1, 4):  # log-probabilities are the model's own
        ours, others = together[row].logprobs, alone[row].logprobs
        assert ours is not None
        assert others is not None
        assert ours.top == others.top
