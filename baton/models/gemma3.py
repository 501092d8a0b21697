"""Gemma 3 (text): five sliding layers to a global one, each kind with its own rotary; heads normed."""

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
    activation = parts.activation("hidden_activation")
    pattern = fields.positive("sliding_window_pattern")
    usual = [SLIDING if (number + 1) % pattern else FULL for number in range(config.layers)]
    kinds = layer_kinds(fields, usual)
    rotaries = {kind: parts.rotary(kind) for kind in (SLIDING, FULL)}
    bias = fields.flag("attention_bias")

    def layer(number: int) -> Layer:
        prefix, kind = f"model.layers.{number}", kinds[number]
        spec = parts.spec(
            scale=fields.number("query_pre_attn_scalar") ** -0.5,
            window=fields.optional_integer("sliding_window") if kind == SLIDING else None,
        )
        return Layer(
            attention_norm=parts.offset_norm(f"{prefix}.input_layernorm"),
            attention=parts.attention(
                f"{prefix}.self_attn",
                spec,
                rotaries[kind],
                qkv_bias=bias,
                out_bias=bias,
                head_norm=parts.offset_norm,
            ),
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
