"""How named tensors become layers: the pieces most families share, under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from baton.attention.base import AttentionSpec
from baton.errors import UnsupportedModel
from baton.models.config import ModelConfig
from baton.models.decoder import Decoder
from baton.models.layers import ACTIVATIONS, Activation, Linear, OffsetRmsNorm, RmsNorm, packs
from baton.models.rope import Rotary
from baton.models.rope_config import read_rope
from baton.models.sublayers import GatedMlp, Layer, Norm, SelfAttention
from baton.models.weights import Weights


class Parts:
    """Builds layers of one checkpoint, and reports how many of them are built.

    Methods raise UnsupportedModel naming the tensor that is missing or misshapen.
    """

    def __init__(self, config: ModelConfig, weights: Weights, report: Callable[[int, int], None]) -> None:
        self.config, self.weights, self._report = config, weights, report
        self.hidden = config.hidden_size
        self.eps = config.fields.number("rms_norm_eps")

    def linear(
        self, names: Sequence[str], rows: Sequence[int], columns: int, *, bias: bool = False
    ) -> Linear:
        """One product that yields the outputs of all `names` (without `.weight`) side by side."""
        parts = [
            self.weights.borrow(f"{name}.weight", count, columns)
            for name, count in zip(names, rows, strict=True)
        ]
        if len(parts) > 1:
            weight = torch.cat(parts)
        elif packs(parts[0]):
            weight = parts[0]  # packing copies it
        else:
            weight = self.weights.take(f"{names[0]}.weight", rows[0], columns)
        biases = [
            self.weights.take(f"{name}.bias", count) for name, count in zip(names, rows, strict=True) if bias
        ]
        return Linear(weight, torch.cat(biases) if biases else None)

    def norm(self, name: str, size: int | None = None) -> RmsNorm:
        return RmsNorm(self.weights.take(f"{name}.weight", size or self.hidden), self.eps)

    def offset_norm(self, name: str, size: int | None = None) -> OffsetRmsNorm:
        return OffsetRmsNorm(self.weights.take(f"{name}.weight", size or self.hidden), self.eps)

    def rotary(self, layer_type: str | None = None) -> Rotary:
        rope = read_rope(self.config.fields, self.config.head_dim, layer_type)
        return Rotary(rope, self.config.max_model_len, self.weights.device)

    def activation(self, field: str = "hidden_act") -> Activation:
        name = self.config.fields.text(field)
        if name not in ACTIVATIONS:
            raise UnsupportedModel(
                f"{self.config.path}: {field} {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def spec(
        self, *, scale: float | None = None, window: int | None = None, softcap: float | None = None
    ) -> AttentionSpec:
        config = self.config
        if scale is None:
            scale = config.head_dim**-0.5
        return AttentionSpec(config.heads, config.kv_heads, config.head_dim, scale, window, softcap)

    def attention(
        self,
        prefix: str,
        spec: AttentionSpec,
        rotary: Rotary,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norm: Callable[[str, int], Norm] | None = None,
    ) -> SelfAttention:
        """`{prefix}.{q,k,v,o}_proj`, and `{q,k}_norm` where `head_norm` says what kind."""
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        return SelfAttention(
            spec=spec,
            rotary=rotary,
            qkv=self.linear(names, (q, kv, kv), self.hidden, bias=qkv_bias),
            out=self.linear([f"{prefix}.o_proj"], (self.hidden,), q, bias=out_bias),
            query_norm=head_norm(f"{prefix}.q_norm", spec.head_dim) if head_norm else None,
            key_norm=head_norm(f"{prefix}.k_norm", spec.head_dim) if head_norm else None,
        )

    def mlp(self, prefix: str, activation: Activation, *, bias: bool = False) -> GatedMlp:
        """`{prefix}.{gate,up,down}_proj`."""
        inner = self.config.fields.positive("intermediate_size")
        return GatedMlp(
            gate_up=self.linear(
                [f"{prefix}.gate_proj", f"{prefix}.up_proj"], (inner, inner), self.hidden, bias=bias
            ),
            down=self.linear([f"{prefix}.down_proj"], (self.hidden,), inner, bias=bias),
            activation=activation,
        )

    def decoder(
        self,
        layer: Callable[[int], Layer],
        fingerprint: str,
        *,
        norm: Norm | None = None,
        embedding_scale: float | None = None,
        logits_softcap: float | None = None,
    ) -> Decoder:
        """The whole model; `layer` builds the layer of a number.

        Without `lm_head.weight` the head is the embedding, if config.json ties the two.
        """
        config = self.config
        embedding = self.weights.take("model.embed_tokens.weight", config.vocab_size, self.hidden)
        if config.tied_embeddings and "lm_head.weight" not in self.weights:
            head = Linear(embedding)
        else:
            head = self.linear(["lm_head"], (config.vocab_size,), self.hidden)
        layers = []
        for number in range(config.layers):
            layers.append(layer(number))
            self._report(number + 1, config.layers)
        return Decoder(
            config,
            embedding=embedding,
            layers=layers,
            norm=norm or self.norm("model.norm"),
            head=head,
            fingerprint=fingerprint,
            embedding_scale=embedding_scale,
            logits_softcap=logits_softcap,
        )
