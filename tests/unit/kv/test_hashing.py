"""Block ids: the same everywhere and for ever, chained, and different whenever the KV may be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.hashing import Chain, ChainHasher, KvLayout, extend_chain

LAYOUT = KvLayout("fingerprint", "float32", 16, 4096, "blocks")
ROOT = b"x" * 16


def test_ids_never_change() -> None:
    assert extend_chain(ROOT, range(32), 16)[-1].hex() == "57fd9b6fdb6c573d5e87857b8ec5b43a"
    assert LAYOUT.root("salt").hex() == "60c4c14372f072caf121e5aac068cdcc"


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=70), cut=st.integers(0, 4))
def test_a_chain_goes_on_where_it_ended(tokens: list[int], cut: int) -> None:
    ids = extend_chain(ROOT, tokens, 16)
    assert len(ids) == len(tokens) // 16
    assert all(len(block_id) == 16 for block_id in ids)
    hasher = ChainHasher(ROOT)
    assert ids == hasher.extend(tokens[: 16 * cut], 16) + hasher.extend(tokens[16 * cut :], 16)


@given(blocks=st.integers(0, 400), data=st.data())
def test_ids_computed_when_asked_for_are_the_same_in_any_order(blocks: int, data: st.DataObject) -> None:
    tokens = range(blocks * 2 + 1)
    ids, chain = extend_chain(ROOT, tokens, 2), Chain(ROOT, tokens, 2)
    assert len(chain) == blocks
    for at in data.draw(st.lists(st.integers(-blocks, blocks - 1), max_size=20) if blocks else st.just([])):
        assert chain[at] == ids[at]
    assert list(chain) == ids == chain[:]
    with pytest.raises(IndexError):
        chain[blocks]


def test_another_token_parent_layout_or_salt_gives_other_ids() -> None:
    ids = [
        extend_chain(ROOT, range(32), 16),
        extend_chain(ROOT, [1, *range(1, 32)], 16),
        extend_chain(b"y" * 16, range(32), 16),
    ]
    assert len({block_id for chain in ids for block_id in chain}) == 6
    changed = [{"model_fingerprint": "other"}, {"dtype": "bfloat16"}, {"block_size": 32}]
    roots = {LAYOUT.root(), LAYOUT.root("salt"), *(replace(LAYOUT, **change).root() for change in changed)}
    assert len(roots) == 5
