"""What a model folder says about itself: architecture, sizes, context length, eos, sampling defaults.

No torch here, so the router can read it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from baton.errors import UnsupportedModel
from baton.models.fields import Fields
from baton.models.rope_config import read_rope
from baton.models.windows import FULL

_SHARED: Mapping[str, object] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

#: What a config.json of each architecture may leave out, by the name in its `architectures`.
ARCHITECTURES: Mapping[str, Mapping[str, object]] = {
    "LlamaForCausalLM": {
        **_SHARED, "model_type": "llama", "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "MistralForCausalLM": {
        **_SHARED, "model_type": "mistral", "max_position_embeddings": 131_072, "sliding_window": 4096,
        "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": {
        **_SHARED, "model_type": "qwen2", "max_position_embeddings": 32_768, "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "Qwen3ForCausalLM": {
        **_SHARED, "model_type": "qwen3", "max_position_embeddings": 32_768, "sliding_window": 4096,
        "max_window_layers": 28, "head_dim": 128,
    },
    "Gemma2ForCausalLM": {
        **_SHARED, "model_type": "gemma2", "max_position_embeddings": 8192, "sliding_window": 4096,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
        "bos_token_id": 2, "eos_token_id": 1,
    },
    "Gemma3ForCausalLM": {
        **_SHARED, "model_type": "gemma3_text", "max_position_embeddings": 131_072, "sliding_window": 4096,
        "sliding_window_pattern": 6, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    },
    "Phi3ForCausalLM": {
        **_SHARED, "model_type": "phi3", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 32_000,
    },
    "MixtralForCausalLM": {
        **_SHARED, "model_type": "mixtral", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
    },
    "Qwen3MoeForCausalLM": {
        **_SHARED, "model_type": "qwen3_moe", "max_position_embeddings": 32_768, "sliding_window": 4096,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
}  # fmt: skip

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SamplingDefaults:
    """What generation_config.json recommends; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """One model folder. `max_model_len` is in tokens, prompt and output together.

    `dtype` is the checkpoint's. `fields` is the whole config.json with the architecture's defaults
    beneath, for the family that builds the layers.
    """

    path: Path
    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_model_len: int
    dtype: str
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sampling: SamplingDefaults
    fields: Fields = field(repr=False, compare=False)


def read_config(path: Path, max_model_len: int = 0) -> ModelConfig:
    """Read config.json and generation_config.json of the folder `path`.

    `max_model_len` sets the context length; 0 keeps the model's usual one.

    Raises:
        UnsupportedModel: the folder is no model, or one that baton cannot serve; says which and why.
    """
    values = _read_json(path / "config.json")
    if values is None:
        raise UnsupportedModel(f"{path} has no config.json; it is no model folder in Hugging Face layout")
    architecture = _architecture(path, values)
    fields = Fields(f"{path / 'config.json'}", values, ARCHITECTURES[architecture])
    quantization = fields.inner("quantization_config")
    if quantization is not None:
        method = quantization.given("quant_method") or "an unnamed method"
        raise UnsupportedModel(f"{path} is quantized with {method}, which is not supported")
    heads = fields.positive("num_attention_heads")
    head_dim = fields.optional_integer("head_dim") or fields.positive("hidden_size") // heads
    kv_heads = fields.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UnsupportedModel(
            f"{fields.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    generation = Fields(
        f"{path / 'generation_config.json'}", _read_json(path / "generation_config.json") or {}, {}
    )
    bos = generation.integers("bos_token_id") or fields.integers("bos_token_id")
    return ModelConfig(
        path=path,
        architecture=architecture,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=fields.positive("hidden_size"),
        layers=fields.positive("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=_context(fields, head_dim, max_model_len),
        dtype=_dtype(fields),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=generation.integers("eos_token_id") or fields.integers("eos_token_id"),
        sampling=SamplingDefaults(
            temperature=generation.optional_number("temperature"),
            top_p=generation.optional_number("top_p"),
            top_k=generation.optional_integer("top_k"),
            min_p=generation.optional_number("min_p"),
            repetition_penalty=generation.optional_number("repetition_penalty"),
        ),
        fields=fields,
    )


def rope_layer_type(fields: Fields) -> str | None:
    """The kind of layer whose rotary embedding bounds the context; None where all layers share one."""
    return FULL if fields.text("model_type") == "gemma3_text" else None


def _read_json(file: Path) -> dict[str, object] | None:
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnsupportedModel(f"{file} cannot be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(raw, type=dict[str, object])
    except RecursionError as error:
        raise UnsupportedModel(f"{file} is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnsupportedModel(f"{file} is not a JSON object: {error}") from error


def _architecture(path: Path, values: Mapping[str, object]) -> str:
    named = values.get("architectures")
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    if isinstance(named, list) and named:
        for architecture in named:
            if architecture in ARCHITECTURES:
                return str(architecture)
        raise UnsupportedModel(f"{path}: architecture {named[0]!r} is not supported; {supported}")
    for architecture, defaults in ARCHITECTURES.items():
        if defaults["model_type"] == values.get("model_type"):
            return architecture
    raise UnsupportedModel(f"{path}: config.json names no supported architecture; {supported}")


def _context(fields: Fields, head_dim: int, wanted: int) -> int:
    rope = read_rope(fields, head_dim, rope_layer_type(fields))
    if wanted > rope.longest:
        raise UnsupportedModel(
            f"{fields.where} allows {rope.longest} tokens of context, --max-model-len asks for {wanted}"
        )
    return wanted or rope.usual


def _dtype(fields: Fields) -> str:
    dtype = fields.given("dtype") or fields.given("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise UnsupportedModel(
            f"{fields.where}: dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}"
        )
    return str(dtype)
