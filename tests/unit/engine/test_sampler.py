"""Sampling follows the distribution asked for, and a row's token does not depend on its batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.device import HostDevice
from baton.engine.draw import uniform
from baton.engine.sampler import Sampled, Sampler
from baton.engine.sequence import Sequence as Choice
from baton.sampling import Sampling

VOCAB = 40


def choice(tokens: Sequence[int] = (0,), prompt_len: int | None = None, **sampling) -> Choice:
    return Choice(
        key=0,
        request_id="r",
        tokens=list(tokens),
        prompt_len=len(tokens) if prompt_len is None else prompt_len,
        sampling=Sampling(max_tokens=10, **sampling),
        root=bytes(16),
        block_size=4,
    )


def sample(logits: torch.Tensor, choices: Sequence[Choice], eos: Sequence[int] = ()) -> list[Sampled]:
    """One token per row of logits, which stay as they are."""
    rows = Sampler(eos, HostDevice(logits.device)).sample(logits.clone(), choices)
    return rows.read(rows.tensors)


def draw(logits: torch.Tensor, one: Choice) -> int:
    return sample(logits[None], [one], eos=[2])[0].token_id


def frequencies(logits: torch.Tensor, draws: int = 4000, **sampling) -> torch.Tensor:
    choices = [choice(seed=seed, **sampling) for seed in range(draws)]
    sampled = sample(logits.expand(draws, -1), choices)
    return torch.bincount(torch.tensor([s.token_id for s in sampled]), minlength=logits.shape[0]) / draws


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_uniform_is_a_pure_function_spread_over_the_unit_interval() -> None:
    numbers = [uniform(seed, position) for seed in range(200) for position in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.01
    assert uniform(7, 3) == uniform(7, 3)


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 0.25}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"temperature": 0.5}, [x * x / 0.345 for x in (0.5, 0.25, 0.15, 0.1)]),
        ({"logit_bias": {3: math.log(5)}}, [0.5 / 1.4, 0.25 / 1.4, 0.15 / 1.4, 0.5 / 1.4]),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling, wanted) -> None:
    got = frequencies(logits_of([0.5, 0.25, 0.15, 0.1]), **sampling)
    assert torch.allclose(got, torch.tensor(wanted), atol=0.03)
    assert all(g == 0 for g, w in zip(got, wanted, strict=True) if w == 0)


def test_penalties_change_logits_as_documented() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert draw(logits, choice([0], temperature=0.0, repetition_penalty=1.2)) == 1
    assert draw(logits, choice([1, 0], 1, temperature=0.0, presence_penalty=0.2)) == 1
    assert draw(logits, choice([1, 0], 1, temperature=0.0, presence_penalty=0.05)) == 0
    assert draw(logits, choice([1, 0, 0, 0], 1, temperature=0.0, frequency_penalty=0.05)) == 1
    assert draw(logits, choice([0], temperature=0.0, presence_penalty=2.0)) == 0  # the prompt does not count


def test_no_stop_token_before_min_tokens() -> None:
    logits = torch.tensor([0.0, 1.0, 9.0, 8.0])
    assert draw(logits, choice(temperature=0.0)) == 2
    assert draw(logits, choice(temperature=0.0, min_tokens=1)) == 3
    assert draw(logits, choice(temperature=0.0, min_tokens=1, stop_token_ids=(3,))) == 1
    assert draw(logits, choice(temperature=0.0, min_tokens=1, ignore_eos=True)) == 2
    assert draw(logits, choice([0, 1], 1, temperature=0.0, min_tokens=1)) == 2


def test_logprobs_are_the_models_own_and_ranked() -> None:
    probabilities = [0.5, 0.3, 0.2]
    sampled = sample(
        logits_of(probabilities)[None], [choice(temperature=0.0, logprobs=2, logit_bias={2: 100.0})]
    )[0]
    assert sampled.token_id == 2
    assert sampled.logprobs is not None
    assert sampled.logprobs.chosen.rank == 3
    assert math.isclose(sampled.logprobs.chosen.logprob, math.log(0.2), abs_tol=1e-5)
    assert [t.token_id for t in sampled.logprobs.top] == [0, 1]
    assert [t.rank for t in sampled.logprobs.top] == [1, 2]


samplings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.integers(0, VOCAB + 3),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "seed": st.integers(0, 2**64 - 1),
        "logprobs": st.integers(0, 5),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.7]),
    },
)


@settings(max_examples=80)
@given(st.lists(samplings, min_size=1, max_size=6), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_batch(rows, seed) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    choices = [choice([1, 2, 3], 1, **row) for row in rows]
    together = sample(logits, choices, eos=[2])
    alone = [sample(logits[i : i + 1], [choices[i]], eos=[2])[0] for i in range(len(rows))]
    assert together == alone
