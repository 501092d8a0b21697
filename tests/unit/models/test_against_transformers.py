"""Greedy tokens are exactly transformers' for every architecture, in mixed batches, chunked and not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from batch_driver import Driver
from reference_models import VARIANTS, VOCAB, Variant, variant, write_reference

from baton.models.base import Model
from baton.models.loader import load_model

LENGTHS = (1, 15, 16, 17, 100, 600)
NEW_TOKENS = 32
# float32 sums in another order differ by a few units in the last place per layer; logits here have a
# standard deviation around 1 and up to 30, so a mistake shows as more than this and rounding as less.
ROUNDING = 5e-4


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda each: each.name)
def chosen(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture(scope="module")
def reference(chosen: Variant, tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    folder = tmp_path_factory.mktemp(chosen.name)
    model = write_reference(chosen, folder)
    model.folder = folder
    return model


@pytest.fixture(scope="module")
def model(chosen: Variant, reference: transformers.PreTrainedModel) -> Model:
    return load_model(reference.folder, "cpu", "float32", chosen.max_model_len)


@pytest.fixture(scope="module")
def prompts(chosen: Variant) -> list[list[int]]:
    draw = random.Random(chosen.name)
    lengths = [length for length in LENGTHS if length >= chosen.shortest]
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def answers(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    return Driver(model).generate(prompts, NEW_TOKENS, chunk=600)


def test_every_token_is_the_references_most_likely_one_by_a_clear_margin(
    reference: transformers.PreTrainedModel,
    model: Model,
    prompts: list[list[int]],
    answers: list[list[int]],
) -> None:
    """Given our own tokens the reference would choose each of them, which by induction is what it
    generates; and by a margin that rounding cannot bridge, so agreement is no luck."""
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = prompt + answer[:-1]
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0]
        ours = Driver(model).logits(tokens)
        assert float((ours - expected).abs().max()) < ROUNDING
        deciding = expected[len(prompt) - 1 :]
        assert deciding.argmax(-1).tolist() == answer
        best, second = deciding.topk(2).values.unbind(-1)
        assert float((best - second).min()) > 2 * float((ours - expected).abs().max())


def test_generate_itself_agrees(
    reference: transformers.PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    prompt, answer = prompts[-1], answers[-1]
    output = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None
    )
    assert output[0, len(prompt) :].tolist() == answer


def test_chunked_prompts_give_the_same_tokens(
    model: Model, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    assert Driver(model, seed=7).generate(prompts, NEW_TOKENS, chunk=77) == answers


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe"])
def test_bfloat16_is_as_close_to_float32_as_the_references_bfloat16(name: str, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits, so two right implementations differ in every logprob. The measure is the
    reference's own distance from its float32 logprobs: ours may not be a quarter farther on average."""
    reference = write_reference(variant(name), tmp_path)
    tokens = [random.Random(3).randrange(VOCAB) for _ in range(300)]
    with torch.no_grad():
        exact = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
        theirs = reference.bfloat16()(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    ours = Driver(load_model(tmp_path, "cpu", "bfloat16")).logits(tokens).log_softmax(-1)
    assert float((ours - exact).abs().mean()) < 1.25 * float((theirs - exact).abs().mean())
