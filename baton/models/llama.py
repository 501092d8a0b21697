"""Llama 2 and 3.x: pre-norm layers, grouped queries, every rope scaling type, optional biases."""

from __future__ import annotations

from baton.models.decoder import Decoder
from baton.models.parts import Parts
from baton.models.sublayers import Layer


def build(parts: Parts, fingerprint: str) -> Decoder:
    fields = parts.config.fields
    rotary, activation = parts.rotary(), parts.activation()
    attention_bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}"
        return Layer(
            attention_norm=parts.norm(f"{prefix}.input_layernorm"),
            attention=parts.attention(
                f"{prefix}.self_attn", parts.spec(), rotary, qkv_bias=attention_bias, out_bias=attention_bias
            ),
            mlp_norm=parts.norm(f"{prefix}.post_attention_layernorm"),
            mlp=parts.mlp(f"{prefix}.mlp", activation, bias=mlp_bias),
        )

    return parts.decoder(layer, fingerprint)
