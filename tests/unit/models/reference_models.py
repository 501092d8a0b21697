"""Small random models written by transformers itself: every architecture and rope type baton supports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

VOCAB = 503


@dataclass(frozen=True)
class Variant:
    """A transformers configuration class and what to change in it.

    `max_model_len` is what baton is told to serve (0: its default); `shortest` is the shortest prompt
    for which the reference does what baton does.
    """

    name: str
    config: str
    changes: Mapping[str, object] = field(default_factory=dict)
    max_model_len: int = 0
    shortest: int = 1


def _rope(kind: str, **parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


def _longrope(original: int) -> dict[str, object]:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [1.0 + i for i in range(6)]}
    return {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": original,
        **_rope("longrope", partial_rotary_factor=0.75, **factors),
    }


_BIASED = {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": True}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 72}

VARIANTS = (
    Variant("llama", "LlamaConfig", {"num_key_value_heads": 4}),
    Variant("llama-grouped-biased-tied", "LlamaConfig", _BIASED),
    Variant("llama-rope-linear", "LlamaConfig", _rope("linear", factor=4.0)),
    Variant("llama-rope-dynamic", "LlamaConfig", _rope("dynamic", factor=4.0)),
    Variant("llama-rope-yarn", "LlamaConfig", _rope("yarn", **_YARN)),
    Variant("llama-rope-llama3", "LlamaConfig", _rope("llama3", **_LLAMA3)),
    Variant("mistral-window", "MistralConfig", {"sliding_window": 48}),
    Variant("mistral-global", "MistralConfig", {"sliding_window": None, "head_dim": 32}),
    Variant("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    Variant(
        "qwen2-upper-layers-slide",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
    Variant("qwen3", "Qwen3Config", {"head_dim": 32, "attention_bias": True}),
    Variant(
        "qwen3-yarn-slides",
        "Qwen3Config",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 300,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **_rope("yarn", mscale=0.7, mscale_all_dim=0.4, truncate=False, **_YARN),
        },
    ),
    Variant(
        "gemma2",
        "Gemma2Config",
        {"head_dim": 20, "query_pre_attn_scalar": 18, "sliding_window": 33, "attn_logit_softcapping": 5.0},
    ),
    Variant(
        "gemma3",
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 18,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    Variant("phi3", "Phi3Config", {"sliding_window": 200}),
    Variant("phi3-longrope-short", "Phi3Config", _longrope(1024)),
    Variant("phi3-longrope-long", "Phi3Config", _longrope(90), max_model_len=2048, shortest=91),
    Variant("mixtral", "MixtralConfig", {"num_local_experts": 4, **_EXPERTS}),
    Variant(
        "qwen3-moe",
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    Variant(
        "qwen3-moe-every-other",
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
        },
    ),
)


def variant(name: str) -> Variant:
    return next(each for each in VARIANTS if each.name == name)


def write_reference(chosen: Variant, folder: Path, **saving: object) -> transformers.PreTrainedModel:
    """Make the model of `chosen`, save it to `folder` and return it in float32.

    Weights are wide enough that the most likely token stands out, and biases and norms are random
    too: transformers would start them at values that hide a mistake.
    """
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(1)
    config = getattr(transformers, chosen.config)(**{**sizes, **chosen.changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, **saving)
    return model
