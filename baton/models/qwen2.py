"""Qwen2 and 2.5: Llama with biased queries, keys and values; upper layers may slide."""

from __future__ import annotations

from baton.models.decoder import Decoder
from baton.models.parts import Parts
from baton.models.sublayers import Layer
from baton.models.windows import qwen_windows


def build(parts: Parts, fingerprint: str) -> Decoder:
    rotary, activation = parts.rotary(), parts.activation()
    windows = qwen_windows(parts.config.fields)

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}"
        return Layer(
            attention_norm=parts.norm(f"{prefix}.input_layernorm"),
            attention=parts.attention(
                f"{prefix}.self_attn", parts.spec(window=windows[number]), rotary, qkv_bias=True
            ),
            mlp_norm=parts.norm(f"{prefix}.post_attention_layernorm"),
            mlp=parts.mlp(f"{prefix}.mlp", activation),
        )

    return parts.decoder(layer, fingerprint)
