"""Prompts on their way to a worker count as held there, until they are computed or given up."""

from __future__ import annotations

from typing import NoReturn

from hypothesis import given
from hypothesis import strategies as st

from baton.kv.hashing import extend_chain
from baton.routing.expected import Expected

prompts = st.lists(st.integers(0, 1), max_size=6)


def chain_of(tokens: list[int]) -> list[bytes]:
    return extend_chain(bytes(16), tokens, 1)


@given(st.lists(st.tuples(st.sampled_from("ab"), prompts)), prompts, st.data())
def test_it_knows_the_longest_common_beginning_with_what_is_on_its_way(
    sent: list[tuple[str, list[int]]], asked: list[int], data: st.DataObject
) -> None:
    expected = Expected()
    left = []
    for worker, tokens in sent:
        left.append((worker, tokens, expected.add(worker, chain_of(tokens))))
        if data.draw(st.booleans(), label="look between"):
            expected.lookup(chain_of(asked))
    for going in data.draw(st.lists(st.sampled_from(left), unique_by=id) if left else st.just([])):
        expected.remove(going[2])
        left.remove(going)
    longest: dict[str, int] = {}
    for worker, tokens, _ in left:
        common = next((n for n, (a, b) in enumerate(zip(tokens, asked, strict=False)) if a != b), None)
        length = min(len(tokens), len(asked)) if common is None else common
        if length:
            longest[worker] = max(longest.get(worker, 0), length)
    assert expected.lookup(chain_of(asked)) == longest


def test_a_worker_that_is_gone_is_forgotten_with_what_was_sent_to_it() -> None:
    expected = Expected()
    old = expected.add("a", chain_of([1, 2]))
    expected.lookup(chain_of([1, 2]))
    expected.forget("a")
    assert expected.lookup(chain_of([1, 2])) == {}
    expected.add("a", chain_of([1, 2]))
    expected.remove(old)
    assert expected.lookup(chain_of([1, 2])) == {"a": 2}


def test_a_prompt_like_no_other_is_not_hashed_beyond_its_first_block() -> None:
    class Lazy(list[bytes]):
        def __iter__(self) -> NoReturn:
            raise AssertionError("all blocks were named")

    expected = Expected()
    coming = expected.add("a", Lazy(chain_of([1, 2, 3])))
    assert expected.lookup(chain_of([0, 2, 3])) == {}
    expected.remove(coming)
    assert expected.lookup(chain_of([1, 2, 3])) == {}
