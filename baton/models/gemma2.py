"""Gemma 2: layers slide in turn, scores and logits are soft-capped, each part is normed before and after."""

from __future__ import annotations

from baton.errors import UnsupportedModel
from baton.models.decoder import Decoder
from baton.models.parts import Parts
from baton.models.sublayers import Layer
from baton.models.windows import FULL, SLIDING, layer_kinds


def build(parts: Parts, fingerprint: str) -> Decoder:
    config, fields = parts.config, parts.config.fields
    if fields.flag("use_bidirectional_attention"):
        raise UnsupportedModel(f"{config.path}: use_bidirectional_attention is not supported")
    rotary, activation = parts.rotary(), parts.activation("hidden_activation")
    usual = [FULL if number % 2 else SLIDING for number in range(config.layers)]
    kinds = layer_kinds(fields, usual)
    bias = fields.flag("attention_bias")

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}"
        spec = parts.spec(
            scale=fields.number("query_pre_attn_scalar") ** -0.5,
            window=fields.optional_integer("sliding_window") if kinds[number] == SLIDING else None,
            softcap=fields.optional_number("attn_logit_softcapping"),
        )
        return Layer(
            attention_norm=parts.offset_norm(f"{prefix}.input_layernorm"),
            attention=parts.attention(f"{prefix}.self_attn", spec, rotary, qkv_bias=bias, out_bias=bias),
            after_attention_norm=parts.offset_norm(f"{prefix}.post_attention_layernorm"),
            mlp_norm=parts.offset_norm(f"{prefix}.pre_feedforward_layernorm"),
            mlp=parts.mlp(f"{prefix}.mlp", activation),
            after_mlp_norm=parts.offset_norm(f"{prefix}.post_feedforward_layernorm"),
        )

    return parts.decoder(
        layer,
        fingerprint,
        norm=parts.offset_norm("model.norm"),
        embedding_scale=parts.hidden**0.5,
        logits_softcap=fields.optional_number("final_logit_softcapping"),
    )
