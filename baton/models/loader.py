"""How a model folder becomes a model that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from baton.config import Dtype
from baton.device import devices_from
from baton.models import gemma2, gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe
from baton.models.base import Model
from baton.models.config import ModelConfig, read_config, rope_layer_type
from baton.models.decoder import Decoder
from baton.models.memory import keep_freed_memory
from baton.models.parts import Parts
from baton.models.rope_config import read_rope
from baton.models.shard import Shard
from baton.models.spread import SpreadModel
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
    tensor_parallel: int = 1,
) -> Model:
    """Load the folder `path`. `dtype` auto is float32 on cpu and the checkpoint's elsewhere. `report` is
    called with the layers that are loaded and of how many. With `tensor_parallel`, the model is spread over
    so many devices: `device`, if that is cuda, and those that follow it.

    Raises:
        UnsupportedModel: it cannot be served; one sentence says what stands in the way.
    """
    config = read_config(path, max_model_len)
    if device == "cpu":
        keep_freed_memory()
    usual = "float32" if device == "cpu" else config.dtype
    chosen = usual if dtype == "auto" else dtype
    fingerprint, shards = "", []
    for number, one in enumerate(devices_from(torch.device(device), tensor_parallel)):
        weights = Weights(path, one, getattr(torch, chosen))
        fingerprint = fingerprint or _fingerprint(config, weights)
        told = partial(_report_shard, report, number, tensor_parallel)
        parts = Parts(config, weights, told, Shard(number, tensor_parallel))
        shards.append(_FAMILIES[config.architecture](parts, fingerprint))
    return shards[0] if len(shards) == 1 else SpreadModel(shards)


def _report_shard(report: Callable[[int, int], None], number: int, of: int, done: int, total: int) -> None:
    report(number * total + done, of * total)


def _fingerprint(config: ModelConfig, weights: Weights) -> str:
    """Names the weights, config.json, and which of longrope's two sets of frequencies is in use."""
    text = (config.path / "config.json").read_bytes()
    rope = read_rope(config.fields, config.head_dim, rope_layer_type(config.fields))
    long = rope.kind == "longrope" and config.max_model_len > rope.original_max
    return fingerprint(weights.files, text + (b"long" if long else b""))
