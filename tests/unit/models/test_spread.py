"""A model spread over devices computes what one device does, whatever the family and its KV heads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from batch_driver import Driver
from reference_models import VARIANTS, VOCAB, Variant, variant, write_reference

from baton.errors import UnsupportedModel
from baton.models.loader import load_model
from baton.models.spread import SpreadModel, added_up

# As against transformers: a shard's sums are in another order.
ROUNDING = 5e-4


def _tokens(count: int) -> list[int]:
    draw = random.Random(count)
    return [draw.randrange(VOCAB) for _ in range(count)]


@pytest.mark.parametrize("chosen", VARIANTS, ids=lambda each: each.name)
def test_logits_are_those_of_one_device(chosen: Variant, tmp_path: Path) -> None:
    write_reference(chosen, tmp_path)
    tokens = _tokens(400)
    whole = load_model(tmp_path, "cpu", "float32", chosen.max_model_len)
    expected = Driver(whole).logits(tokens)
    for count in (2, 4):
        spread = load_model(tmp_path, "cpu", "float32", chosen.max_model_len, tensor_parallel=count)
        assert len(spread.shards) == count
        assert spread.fingerprint == whole.fingerprint
        assert float((Driver(spread).logits(tokens) - expected).abs().max()) < ROUNDING


def test_prompts_and_answers_of_any_batch_are_bit_for_bit_the_same(tmp_path: Path) -> None:
    write_reference(variant("llama-grouped-biased-tied"), tmp_path)
    model = load_model(tmp_path, "cpu", "float32", tensor_parallel=2)
    prompts = [_tokens(count) for count in (1, 17, 100, 300)]
    together = Driver(model).generate(prompts, 8, chunk=300)
    assert Driver(model, seed=3).generate(prompts, 8, chunk=77) == together
    assert [Driver(model).generate([prompt], 8, chunk=300)[0] for prompt in prompts] == together
    whole = Driver(load_model(tmp_path, "cpu", "float32"))
    assert whole.generate(prompts, 8, chunk=300) == together


def test_each_device_holds_its_part_of_the_weights(tmp_path: Path) -> None:
    write_reference(variant("llama"), tmp_path)
    model = load_model(tmp_path, "cpu", "float32", tensor_parallel=4)
    assert isinstance(model, SpreadModel)
    attention = Driver(model).attention
    assert [cache.storage.shape[3] for cache in attention.caches] == [1, 1, 1, 1]
    assert attention.layout.block_bytes == sum(cache.layout.block_bytes for cache in attention.caches)
    assert attention.layout.root() == Driver(load_model(tmp_path, "cpu", "float32")).attention.layout.root()


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_fused_experts_are_cut_as_separate_ones_are(name: str, tmp_path: Path) -> None:
    write_reference(variant(name), tmp_path / "separate")
    write_reference(variant(name), tmp_path / "fused", save_original_format=False)
    tokens = _tokens(60)
    separate, fused = (
        Driver(load_model(tmp_path / way, "cpu", "float32", tensor_parallel=2)).logits(tokens)
        for way in ("separate", "fused")
    )
    assert torch.equal(separate, fused)


def test_progress_of_loading_counts_every_devices_layers(tmp_path: Path) -> None:
    write_reference(variant("llama"), tmp_path)
    heard: list[tuple[int, int]] = []
    load_model(tmp_path, "cpu", report=lambda done, total: heard.append((done, total)), tensor_parallel=2)
    assert heard == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("changes", "count", "named"),
    [
        ({}, 3, "number of attention heads is 4, which --tensor-parallel 3"),
        ({"intermediate_size": 90}, 4, "intermediate size is 90, which --tensor-parallel 4"),
        (
            {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3},
            2,
            "3 KV heads, which --tensor-parallel 2",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(
    changes: dict[str, object], count: int, named: str, tmp_path: Path
) -> None:
    write_reference(Variant("llama", "LlamaConfig", {"head_dim": 16, **changes}), tmp_path)
    with pytest.raises(UnsupportedModel, match=named):
        load_model(tmp_path, "cpu", tensor_parallel=count)


def test_sums_are_in_memory_of_their_own() -> None:
    parts = [torch.ones(2, 2), torch.full((2, 2), 2.0)]
    first, second = added_up(parts)
    first.add_(1.0)
    assert torch.equal(second, torch.full((2, 2), 3.0))
