"""Models on the GPU answer as transformers does: tokens in float32, logprobs in bfloat16."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from batch_driver import Driver
from reference_models import VARIANTS, VOCAB, Variant, write_reference

from baton.attention.select import preferred_block_size
from baton.models.base import Model
from baton.models.loader import load_model


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 means float32 here, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def driver(model: Model) -> Driver:
    size = preferred_block_size(model.device, model.dtype, model.attention_specs)
    return Driver(model, blocks=6400 // size, block_size=size)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each.name)
def test_float32_tokens_are_the_references(variant: Variant, tmp_path: Path) -> None:
    reference = write_reference(variant, tmp_path).to("cuda")
    model = load_model(tmp_path, "cuda", "float32", variant.max_model_len)
    draw = random.Random(variant.name)
    lengths = [length for length in (1, 16, 100, 600) if length >= variant.shortest]
    prompts = [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]
    answers = driver(model).generate(prompts, 32, chunk=77)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer[:-1]], device="cuda")
        with torch.no_grad():
            expected = reference(tokens).logits[0, len(prompt) - 1 :]
        assert expected.argmax(-1).tolist() == answer


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: each.name)
def test_bfloat16_is_as_close_to_float32_as_the_references_bfloat16(variant: Variant, tmp_path: Path) -> None:
    reference = write_reference(variant, tmp_path).to("cuda")
    tokens = [random.Random(3).randrange(VOCAB) for _ in range(700)]
    batch = torch.tensor([tokens], device="cuda")
    with torch.no_grad():
        exact = reference(batch).logits[0].log_softmax(-1)
        theirs = reference.bfloat16()(batch).logits[0].float().log_softmax(-1)
    model = load_model(tmp_path, "cuda", "bfloat16", variant.max_model_len)
    ours = driver(model).logits(tokens).log_softmax(-1)
    assert float((ours - exact).abs().mean()) < 1.25 * float((theirs - exact).abs().mean())
