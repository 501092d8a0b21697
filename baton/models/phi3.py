"""Phi-3 and Phi-4-mini: fused projections in the checkpoint, longrope, heads that turn only in part."""

from __future__ import annotations

from baton.models.decoder import Decoder
from baton.models.parts import Parts
from baton.models.sublayers import GatedMlp, Layer, SelfAttention


def build(parts: Parts, fingerprint: str) -> Decoder:
    fields, hidden = parts.config.fields, parts.hidden
    rotary, activation = parts.rotary(), parts.activation()
    spec = parts.spec(window=fields.optional_integer("sliding_window"))
    q, kv = parts.config.heads * spec.head_dim, parts.config.kv_heads * spec.head_dim
    inner = fields.positive("intermediate_size")

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}"
        qkv, gate_up = f"{prefix}.self_attn.qkv_proj", f"{prefix}.mlp.gate_up_proj"
        attention = SelfAttention(
            spec=spec,
            rotary=rotary,
            qkv=parts.linear([qkv], (q + 2 * kv,), hidden, outputs=parts.qkv_outputs),
            out=parts.linear_back(f"{prefix}.self_attn.o_proj", hidden, q, parts.shard.share(q)),
        )
        mlp = GatedMlp(
            gate_up=parts.linear([gate_up], (2 * inner,), hidden, outputs=parts.gate_up_outputs(inner)),
            down=parts.linear_back(f"{prefix}.mlp.down_proj", hidden, inner, parts.inner(inner)),
            activation=activation,
        )
        return Layer(
            attention_norm=parts.norm(f"{prefix}.input_layernorm"),
            attention=attention,
            mlp_norm=parts.norm(f"{prefix}.post_attention_layernorm"),
            mlp=mlp,
        )

    return parts.decoder(layer, fingerprint)
