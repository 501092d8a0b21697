"""A folder that cannot be served is refused at start, in one sentence that names what stands in the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference_models import variant, write_reference
from safetensors.torch import load_file, save_file

from baton.attention.base import AttentionSpec
from baton.attention.select import block_bytes, create_backend
from baton.config import BadSetting
from baton.errors import UnsupportedModel
from baton.models.config import read_config
from baton.models.loader import load_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_reference(variant("llama"), tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def assert_refused(folder: Path, says: str, **loading: object) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(says)) as refusal:
        load_model(folder, "cpu", **loading)
    message = refusal.value.message
    assert "\n" not in message
    assert not message.endswith(".")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM' is not supported"),
        ({"architectures": None, "model_type": "mamba"}, "names no supported architecture"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with gptq"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope type 'axial' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs a factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": "large"}, "hidden_size must be an integer, not 'large'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": 4}, "has no tensor model.layers.3"),
        ({"intermediate_size": 96}, "mlp.gate_proj.weight has shape [88, 64], config.json asks for [96, 64]"),
        ({"attention_bias": True}, "has no tensor model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_config_that_cannot_be_served(llama: Path, changes: dict[str, object], says: str) -> None:
    change_config(llama, **changes)
    assert_refused(llama, says)


def test_layer_kinds_that_do_not_exist_or_do_not_fit(tmp_path: Path) -> None:
    write_reference(variant("qwen3"), tmp_path)
    change_config(tmp_path, layer_types=["full_attention", "linear_attention", "full_attention"])
    assert_refused(tmp_path, "layer type 'linear_attention' is not supported")
    change_config(tmp_path, layer_types=["full_attention"])
    assert_refused(tmp_path, "layer_types names 1 layers, the model has 3")


def test_longrope_factors_that_do_not_fit(tmp_path: Path) -> None:
    write_reference(variant("phi3-longrope-short"), tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    change_config(tmp_path, rope_parameters={**rope, "short_factor": [1.0]})
    assert_refused(tmp_path, "rope short_factor has 1 entries and needs 6")


def test_bidirectional_gemma(tmp_path: Path) -> None:
    write_reference(variant("gemma2"), tmp_path)
    change_config(tmp_path, use_bidirectional_attention=True)
    assert_refused(tmp_path, "use_bidirectional_attention is not supported")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert_refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text("{")
    assert_refused(tmp_path, "config.json is not a JSON object")


def test_weights_that_are_missing(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert_refused(llama, "has no weights file model.safetensors")


def test_weights_that_are_cut_short(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert_refused(llama, "model.safetensors is not a readable safetensors file")


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    write_reference(variant("llama"), tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(tmp_path, f"has no weights file {shard.name}")


def test_an_index_that_is_broken(tmp_path: Path) -> None:
    write_reference(variant("llama"), tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert_refused(tmp_path, "is not a safetensors index")


def test_a_head_that_is_missing(llama: Path) -> None:
    change_tensors(llama, lambda tensors: tensors.pop("lm_head.weight"))
    assert_refused(llama, "has no tensor lm_head.weight")


def test_a_tensor_of_integers(llama: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change_tensors(llama, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert_refused(llama, f"tensor {name} has dtype int8, which is not supported")


def test_a_context_beyond_what_the_model_allows(llama: Path) -> None:
    assert_refused(llama, "allows 1024 tokens of context, --max-model-len asks for 1025", max_model_len=1025)
    with pytest.raises(UnsupportedModel, match="allows 1024 tokens"):
        read_config(llama, 1025)


def test_a_block_size_that_is_no_power_of_two() -> None:
    with pytest.raises(BadSetting, match="--block-size 24 is no power of two"):
        create_backend(torch.device("cpu"), torch.float32, [AttentionSpec(4, 2, 16, 0.25)], 8, 24, "")


def test_layers_whose_kv_differs() -> None:
    specs = [AttentionSpec(4, 2, 16, 0.25), AttentionSpec(4, 1, 16, 0.25)]
    with pytest.raises(UnsupportedModel, match=r"layers differ in \(kv_heads, head_dim\)"):
        block_bytes(specs, torch.float32, 16)
