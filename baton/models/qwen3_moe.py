"""Qwen3-MoE: Qwen3 with a mixture of experts in all layers, or in some."""

from __future__ import annotations

from collections.abc import Callable

import torch

from baton.models.decoder import Decoder
from baton.models.moe import sparse_mlp
from baton.models.parts import Parts
from baton.models.sublayers import Layer


def build(parts: Parts, fingerprint: str) -> Decoder:
    fields = parts.config.fields
    rotary, activation = parts.rotary(), parts.activation()
    bias = fields.flag("attention_bias")
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    dense, step = fields.integers("mlp_only_layers"), fields.positive("decoder_sparse_step")
    # transformers 5 writes num_local_experts where the hub has num_experts.
    experts = fields.optional_integer("num_local_experts") or fields.integer("num_experts")

    def mlp(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        prefix = f"model.layers.{number}.mlp"
        if experts == 0 or number in dense or (number + 1) % step:
            return parts.mlp(prefix, activation)
        return sparse_mlp(
            parts,
            prefix,
            activation,
            experts=experts,
            chosen=fields.positive("num_experts_per_tok"),
            inner=fields.positive("moe_intermediate_size"),
            renormalize=fields.flag("norm_topk_prob"),
            names=("gate_proj", "up_proj", "down_proj"),
        )

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}"
        return Layer(
            attention_norm=parts.norm(f"{prefix}.input_layernorm"),
            attention=parts.attention(
                f"{prefix}.self_attn",
                parts.spec(window=window),
                rotary,
                qkv_bias=bias,
                out_bias=bias,
                head_norm=parts.norm,
            ),
            mlp_norm=parts.norm(f"{prefix}.post_attention_layernorm"),
            mlp=mlp(number),
        )

    return parts.decoder(layer, fingerprint)
