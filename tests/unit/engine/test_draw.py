"""Filters keep what a sort would keep, also among equals, and the draw inverts what is left."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.device import HostDevice
from baton.engine.draw import draw
from baton.sampling import Sampling

# Few different values: most tokens have equals.
logits = st.lists(st.sampled_from([-math.inf, -4.0, -1.0, -0.0, 0.0, 0.25, 2.0]), min_size=6, max_size=6)
filters = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1.0]),
        "top_k": st.integers(0, 7),
        "top_p": st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.2, 1.0]),
    },
)


def by_sorting(values: list[float], sampling: Sampling, uniform: float) -> int:
    likely = (torch.tensor(values).double() / sampling.temperature).softmax(-1)
    likely = likely.where(likely >= likely.max() * sampling.min_p, 0.0)
    weights = [int(each) for each in (likely * 2.0**52).tolist()]
    order = sorted(range(len(values)), key=lambda token: -values[token])
    kept = order[: sampling.top_k] if 0 < sampling.top_k < len(values) else order
    wanted = sampling.top_p * sum(weights[token] for token in kept)
    nucleus, mass = set(), 0
    for token in kept:
        if mass >= wanted:
            break
        nucleus.add(token)
        mass += weights[token]
    target, seen = int(uniform * mass), 0
    for token in sorted(nucleus):
        seen += weights[token]
        if seen > target:
            return token
    raise AssertionError("the target lies beyond all tokens")


@settings(max_examples=150)
@given(st.lists(st.tuples(logits, filters, st.integers(0, 2**20 - 1)), min_size=1, max_size=4))
def test_the_draw_is_that_of_a_sort(rows) -> None:
    rows = [row for row in rows if max(row[0]) > -math.inf]
    if not rows:
        return
    samplings = [Sampling(max_tokens=1, **kept) for _, kept, _ in rows]
    uniforms = [number * 2.0**-20 for _, _, number in rows]
    values = torch.tensor([row for row, _, _ in rows])
    drawn = draw(values, samplings, uniforms, HostDevice(values.device)).tolist()
    expected = [by_sorting(row, *rest) for (row, _, _), *rest in zip(rows, samplings, uniforms, strict=True)]
    assert drawn == expected
