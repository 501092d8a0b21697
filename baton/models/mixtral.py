"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from baton.models.decoder import Decoder
from baton.models.moe import sparse_mlp
from baton.models.parts import Parts
from baton.models.sublayers import Layer


def build(parts: Parts, fingerprint: str) -> Decoder:
    fields = parts.config.fields
    rotary, activation = parts.rotary(), parts.activation()
    spec = parts.spec(window=fields.optional_integer("sliding_window"))

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}"
        hub_name, fused_name = f"{prefix}.block_sparse_moe", f"{prefix}.mlp"
        return Layer(
            attention_norm=parts.norm(f"{prefix}.input_layernorm"),
            attention=parts.attention(f"{prefix}.self_attn", spec, rotary),
            mlp_norm=parts.norm(f"{prefix}.post_attention_layernorm"),
            mlp=sparse_mlp(
                parts,
                fused_name if f"{fused_name}.gate.weight" in parts.weights else hub_name,
                activation,
                experts=fields.positive("num_local_experts"),
                chosen=fields.positive("num_experts_per_tok"),
                inner=fields.positive("intermediate_size"),
                renormalize=True,
                names=("w1", "w3", "w2"),
            ),
        )

    return parts.decoder(layer, fingerprint)
