"""What is read from a model folder, in today's and yesterday's spelling, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from baton.models.config import SamplingDefaults, read_config
from baton.models.rope_config import read_rope
from baton.models.windows import qwen_windows

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def write(folder: Path, config: dict[str, object], generation: dict[str, object] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_the_router_reads_a_config_without_torch() -> None:
    code = "import sys, baton.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_old_sparse_config_gets_its_familys_defaults(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, LLAMA))
    assert (config.kv_heads, config.head_dim, config.max_model_len) == (4, 16, 2048)
    assert (config.bos_token_id, config.eos_token_ids, config.dtype) == (1, (2,), "float32")
    assert not config.tied_embeddings
    assert config.sampling == SamplingDefaults()


def test_generation_config_wins_over_config(tmp_path: Path) -> None:
    generation = {"eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    config = read_config(write(tmp_path, {**LLAMA, "eos_token_id": 3, "torch_dtype": "bfloat16"}, generation))
    assert config.eos_token_ids == (7, 9)
    assert config.dtype == "bfloat16"
    assert config.sampling == SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20)


def test_no_eos_is_no_eos(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, {**LLAMA, "eos_token_id": None})).eos_token_ids == ()


def test_architecture_follows_from_model_type_where_it_is_not_named(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "qwen2"}
    del config["architectures"]
    assert read_config(write(tmp_path, config)).architecture == "Qwen2ForCausalLM"


def test_max_model_len_lowers_the_context(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, LLAMA), 100).max_model_len == 100


def test_yarn_extends_the_context_that_the_card_left_unchanged(tmp_path: Path) -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config = read_config(write(tmp_path, {**LLAMA, "max_position_embeddings": 2048, "rope_scaling": rope}))
    assert config.max_model_len == 8192


def test_longrope_serves_its_short_frequencies_unless_told_otherwise(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    write(
        tmp_path,
        {
            **LLAMA,
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "max_position_embeddings": 131_072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "su", **factors},
        },
    )
    assert read_config(tmp_path).max_model_len == 4096
    assert read_config(tmp_path, 100_000).max_model_len == 100_000


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_rope_reads_the_same_in_every_spelling(tmp_path: Path, spelling: dict[str, object]) -> None:
    rope = read_rope(read_config(write(tmp_path, {**LLAMA, **spelling})).fields, 16)
    assert (rope.kind, rope.theta, rope.factor, rope.rotary_dim) == ("linear", 5e5, 2.0, 16)


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
)
def test_gemma_3_scales_only_global_layers_in_every_spelling(
    tmp_path: Path, spelling: dict[str, object]
) -> None:
    gemma = {**LLAMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **spelling}
    fields = read_config(write(tmp_path, gemma)).fields
    wide, local = read_rope(fields, 16, "full_attention"), read_rope(fields, 16, "sliding_attention")
    assert (wide.kind, wide.theta, wide.factor) == ("linear", 1e6, 8.0)
    assert (local.kind, local.theta, local.factor) == ("default", 1e4, None)


def test_qwen_windows_follow_layer_types_or_max_window_layers(tmp_path: Path) -> None:
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 8}

    def windows(**changes: object) -> list[int | None]:
        return qwen_windows(read_config(write(tmp_path, {**qwen, **changes})).fields)

    assert windows() == [None, None]
    assert windows(use_sliding_window=True, max_window_layers=1) == [None, 8]
    kinds = ["sliding_attention", "full_attention"]
    assert windows(use_sliding_window=True, layer_types=kinds) == [8, None]
