"""Checkpoints load the same however they were saved, and are told apart by what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from batch_driver import Driver
from reference_models import variant, write_reference
from safetensors.torch import load_file, save_file

from baton.models.loader import load_model

TOKENS = list(range(5, 60))


def logits(folder: Path, dtype: str = "auto") -> torch.Tensor:
    return Driver(load_model(folder, "cpu", dtype)).logits(TOKENS)


def test_shards_and_one_file_are_the_same_model(tmp_path: Path) -> None:
    write_reference(variant("llama"), tmp_path / "one")
    write_reference(variant("llama"), tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_fused_and_separate_experts_are_the_same_model(name: str, tmp_path: Path) -> None:
    write_reference(variant(name), tmp_path / "separate")
    write_reference(variant(name), tmp_path / "fused", save_original_format=False)
    assert any(
        key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "fused/model.safetensors")
    )
    assert torch.equal(logits(tmp_path / "separate"), logits(tmp_path / "fused"))


def test_auto_is_float32_on_cpu(tmp_path: Path) -> None:
    write_reference(variant("llama"), tmp_path)
    assert load_model(tmp_path, "cpu", "auto").dtype == torch.float32


def test_a_tied_checkpoint_needs_no_head(tmp_path: Path) -> None:
    write_reference(variant("qwen2"), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    model = load_model(tmp_path, "cpu")
    hidden = torch.randn(3, 64)
    assert torch.allclose(model.logits(hidden), hidden @ embedding.T, atol=1e-5)


def test_the_fingerprint_names_weights_and_config(tmp_path: Path) -> None:
    write_reference(variant("llama"), tmp_path)
    first = load_model(tmp_path, "cpu").fingerprint
    assert load_model(tmp_path, "cpu", "bfloat16").fingerprint == first

    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, file)
    second = load_model(tmp_path, "cpu").fingerprint
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert len({first, second, load_model(tmp_path, "cpu").fingerprint}) == 3


def test_longrope_kv_of_short_and_long_frequencies_is_never_shared(tmp_path: Path) -> None:
    write_reference(variant("phi3-longrope-short"), tmp_path)
    short = load_model(tmp_path, "cpu")
    assert short.fingerprint == load_model(tmp_path, "cpu", max_model_len=500).fingerprint
    assert short.fingerprint != load_model(tmp_path, "cpu", max_model_len=2000).fingerprint
