"""Block ids: the same everywhere and for ever, chained, and different whenever the KV may be."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from baton.kv.hashing import KvLayout, extend_chain

LAYOUT = KvLayout("fingerprint", "float32", 16, 4096, "blocks")
ROOT = b"x" * 16


def test_ids_never_change() -> None:
    assert extend_chain(ROOT, range(32), 16)[-1].hex() == "96e2e53cc3459c957f1bbebcf047f16f"
    assert LAYOUT.root("salt").hex() == "60c4c14372f072caf121e5aac068cdcc"


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=70), cut=st.integers(0, 4))
def test_a_chain_goes_on_from_any_of_its_blocks(tokens: list[int], cut: int) -> None:
    ids = extend_chain(ROOT, tokens, 16)
    assert len(ids) == len(tokens) // 16
    assert all(len(block_id) == 16 for block_id in ids)
    cut = min(cut, len(ids))
    assert ids == ids[:cut] + extend_chain(ids[cut - 1] if cut else ROOT, tokens[16 * cut :], 16)


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
