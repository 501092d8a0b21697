"""Mistral: Llama whose layers all look back over one sliding window, if there is one."""

from __future__ import annotations

from baton.models.decoder import Decoder
from baton.models.parts import Parts
from baton.models.sublayers import Layer


def build(parts: Parts, fingerprint: str) -> Decoder:
    rotary, activation = parts.rotary(), parts.activation()
    spec = parts.spec(window=parts.config.fields.optional_integer("sliding_window"))

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}"
        return Layer(
            attention_norm=parts.norm(f"{prefix}.input_layernorm"),
            attention=parts.attention(f"{prefix}.self_attn", spec, rotary),
            mlp_norm=parts.norm(f"{prefix}.post_attention_layernorm"),
            mlp=parts.mlp(f"{prefix}.mlp", activation),
        )

    return parts.decoder(layer, fingerprint)
