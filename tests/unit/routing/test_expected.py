"""Prompts on their way to a worker count as held there, until they are computed or given up."""

from __future__ import annotations

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
    for worker, tokens in sent:
        expected.add(worker, chain_of(tokens))
    left = list(sent)
    for worker, tokens in data.draw(st.lists(st.sampled_from(sent), unique_by=id) if sent else st.just([])):
        expected.remove(worker, chain_of(tokens))
        left.remove((worker, tokens))
    longest: dict[str, int] = {}
    for worker, tokens in left:
        common = next((n for n, (a, b) in enumerate(zip(tokens, asked, strict=False)) if a != b), None)
        length = min(len(tokens), len(asked)) if common is None else common
        if length:
            longest[worker] = max(longest.get(worker, 0), length)
    assert expected.lookup(chain_of(asked)) == longest


def test_a_worker_that_is_gone_is_forgotten_with_what_was_sent_to_it() -> None:
    expected = Expected()
    expected.add("a", chain_of([1, 2]))
    expected.forget("a")
    expected.remove("a", chain_of([1, 2]))
    assert expected.lookup(chain_of([1, 2])) == {}
