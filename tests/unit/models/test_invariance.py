"""A token's hidden state is the same to the last bit in any batch, chunking and number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from batch_driver import Driver, Running
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import VOCAB, Variant, write_reference

from baton.attention.base import AttentionBatch
from baton.models import native
from baton.models.base import Model
from baton.models.loader import load_model

# Sizes that no vector register divides, one key head and many, windows, soft-capping, experts; and sizes for
# which few rows go through all layers in one call of the compiled kernels, with every norm there is.
MODELS = (
    Variant(
        "ungrouped",
        "LlamaConfig",
        {
            "hidden_size": 60,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 18,
            "intermediate_size": 71,
        },
    ),
    Variant(
        "one-key-head",
        "Gemma2Config",
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "hidden_size": 85,
            "head_dim": 22,
            "sliding_window": 70,
            "query_pre_attn_scalar": 22,
            "intermediate_size": 57,
        },
    ),
    Variant(
        "experts",
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 12,
            "num_experts_per_tok": 7,
            "moe_intermediate_size": 23,
            "norm_topk_prob": True,
        },
    ),
    Variant(
        "whole-panels",
        "Gemma3TextConfig",
        {
            "hidden_size": 128,
            "head_dim": 32,
            "intermediate_size": 96,
            "sliding_window": 70,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
)
LONGEST = 560


@dataclass(frozen=True)
class Subject:
    """A model, token streams, and what each stream's hidden states are when computed alone and at once."""

    model: Model
    streams: list[list[int]]
    expected: list[torch.Tensor]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to compute; on machines without the compiled kernels both are torch's."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "library", lambda: None)
        yield request.param


@pytest.fixture(scope="module", params=MODELS, ids=lambda each: each.name)
def subject(
    request: pytest.FixtureRequest, dtype: str, kernels: str, tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    folder = tmp_path_factory.mktemp(request.param.name)
    write_reference(request.param, folder)
    model = load_model(folder, "cpu", dtype)
    streams = torch.randint(VOCAB, (3, LONGEST), generator=torch.Generator().manual_seed(5)).tolist()
    with threads(1):
        expected = [Driver(model).step([(Running(stream), LONGEST)]) for stream in streams]
    return Subject(model, streams, expected)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with `count` torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@st.composite
def schedules(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Steps of (sequence, tokens): up to six sequences computed in chunks of any size, in any company."""
    left = draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=6))
    steps = []
    while any(left):
        present = [number for number, tokens in enumerate(left) if tokens]
        chosen = draw(st.lists(st.sampled_from(present), min_size=1, unique=True))
        step = []
        for number in chosen:
            # Mostly single tokens and large chunks: few steps, and both of the shapes that serving has.
            tokens = min(left[number], draw(st.sampled_from([1, 2, 5, 17, 130, 257, LONGEST])))
            left[number] -= tokens
            step.append((number, tokens))
        steps.append(step)
        if len(steps) == 40:
            break
    return steps


def assert_bit_equal(subject: Subject, steps: list[list[tuple[int, int]]], seed: int = 0) -> None:
    """Run `steps` and compare every hidden state with the one computed alone and at once."""
    driver = Driver(subject.model, seed=seed)
    streams = len(subject.streams)
    running: dict[int, Running] = {}
    for step in steps:
        for number, _ in step:
            running.setdefault(number, Running(subject.streams[number % streams]))
        driver.step([(running[number], tokens) for number, tokens in step])
    for number, sequence in running.items():
        expected = subject.expected[number % streams][: sequence.computed]
        assert torch.equal(torch.cat(sequence.hidden), expected)


@given(steps=schedules(), seed=st.integers(0, 9))
@settings(max_examples=10, derandomize=True)
def test_hidden_states_are_bit_equal_in_any_company(
    subject: Subject, steps: list[list[tuple[int, int]]], seed: int
) -> None:
    with threads(1):
        assert_bit_equal(subject, steps, seed)


@pytest.mark.parametrize("count", [2, 3])
def test_hidden_states_are_bit_equal_with_any_number_of_threads(subject: Subject, count: int) -> None:
    alone = [[(0, 2)], [(0, 1)], [(0, 300)]]
    together = [[(0, 1), (1, 1), (2, 5), (3, 250)], [(0, 1), (1, 2), (2, 17), (3, 6)]]
    with threads(count):
        assert_bit_equal(subject, alone)
        assert_bit_equal(subject, together)


def test_logits_are_bit_equal_in_any_company(subject: Subject) -> None:
    hidden = subject.expected[0][:40]
    together = subject.model.logits(hidden)
    for first, last in ((0, 1), (1, 3), (3, 8), (8, 40)):
        assert torch.equal(subject.model.logits(hidden[first:last]), together[first:last])


def test_an_overflow_stays_in_its_own_sequence(subject: Subject) -> None:
    """Blocks are reused without being wiped; what an overflowing request leaves must not reach the next."""
    driver = Driver(subject.model, blocks=40)
    spec = subject.model.attention_specs[0]
    driver.attention.begin(AttentionBatch([640], [640], [list(range(40))]))
    kv = torch.full((640, spec.kv_heads, spec.head_dim), torch.inf, dtype=subject.model.dtype)
    q = torch.ones(640, spec.heads, spec.head_dim, dtype=subject.model.dtype)
    for layer in range(len(subject.model.attention_specs)):
        driver.attention.attend(layer, q, kv * torch.nan, kv)
    tokens = 550  # the last block is part ours, part what was left there
    hidden = driver.step([(Running(subject.streams[0]), tokens)])
    assert torch.equal(hidden, subject.expected[0][:tokens])
