"""How a model folder becomes a model that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from baton.config import Dtype
from baton.models import gemma2, gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe
from baton.models.base import Model
from baton.models.config import ModelConfig, read_config, rope_layer_type
from baton.models.decoder import Decoder
from baton.models.memory import keep_freed_memory
from baton.models.parts import Parts
from baton.models.rope_config import read_rope
from baton.models.weights import Weights, fingerprint

_FAMILIES: Mapping[str, Callable[[Parts, str], Decoder]] = {
    "LlamaForCausalLM": llama.build,
    "MistralForCausalLM": mistral.build,
    "Qwen2ForCausalLM": qwen2.build,
    "Qwen3ForCausalLM": qwen3.build,
    "Gemma2ForCausalLM": gemma2.build,
    "Gemma3ForCausalLM": gemma3.build,
    "Phi3ForCausalLM": phi3.build,
    "MixtralForCausalLM": mixtral.build,
    "Qwen3MoeForCausalLM": qwen3_moe.build,
}


def load_model(
    path: Path,
    device: str,
    dtype: Dtype = "auto",
    max_model_len: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Model:
    """Load the folder `path`. `dtype` auto is float32 on cpu and the checkpoint's elsewhere. `report` is
    called with the layers that are loaded and of how many.

    Raises:
        UnsupportedModel: it cannot be served; one sentence says what stands in the way.
    """
    config = read_config(path, max_model_len)
    if device == "cpu":
        keep_freed_memory()
    usual = "float32" if device == "cpu" else config.dtype
    chosen = usual if dtype == "auto" else dtype
    weights = Weights(path, torch.device(device), getattr(torch, chosen))
    return _FAMILIES[config.architecture](Parts(config, weights, report), _fingerprint(config, weights))


def _fingerprint(config: ModelConfig, weights: Weights) -> str:
    """Names the weights, config.json, and which of longrope's two sets of frequencies is in use."""
    text = (config.path / "config.json").read_bytes()
    rope = read_rope(config.fields, config.head_dim, rope_layer_type(config.fields))
    long = rope.kind == "longrope" and config.max_model_len > rope.original_max
    return fingerprint(weights.files, text + (b"long" if long else b""))
