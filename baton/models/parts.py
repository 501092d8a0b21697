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
from baton.models.shard import Shard, scaled, side_by_side, within
from baton.models.sublayers import GatedMlp, Layer, Norm, SelfAttention
from baton.models.weights import Part, Weights


class Parts:
    """Builds a shard of the layers of one checkpoint, and reports how many of them are built.

    Sizes that are given are those of the whole model. Methods raise UnsupportedModel naming the tensor that
    is missing or misshapen.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, report: Callable[[int, int], None], shard: Shard
    ) -> None:
        self.config, self.weights, self._report, self.shard = config, weights, report, shard
        self.hidden = config.hidden_size
        self.eps = config.fields.number("rms_norm_eps")
        shard.equal_share(config.heads, "number of attention heads")
        self._kv_heads = shard.kv_heads(config.kv_heads)

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        outputs: Sequence[range] = (),
        inputs: range | None = None,
    ) -> Linear:
        """One product that yields the outputs of all `names` (without `.weight`) side by side; of them, only
        `outputs`, and only what `inputs` add to them, where those are given."""
        if self.shard.is_whole or not outputs:
            outputs = (range(sum(rows)),)
        inputs = inputs or range(columns)
        parts, biases, start = [], [], 0
        for name, count in zip(names, rows, strict=True):
            for kept in within(outputs, start, count):
                part = _part(kept, slice(inputs.start, inputs.stop))
                parts.append(self.weights.borrow(f"{name}.weight", count, columns, part=part))
                if bias:
                    biases.append(self.weights.take(f"{name}.bias", count, part=_part(kept)))
            start += count
        if len(parts) > 1:
            weight = torch.cat(parts)
        else:
            (weight,) = parts
            if weight.device.type == "cpu" and not packs(weight):  # packing copies it
                weight = weight.clone()
        return Linear(weight, torch.cat(biases) if biases else None)

    def linear_back(self, name: str, rows: int, columns: int, inputs: range, *, bias: bool = False) -> Linear:
        """The product `name` of only `inputs`: those of all shards add up to the whole, bias included."""
        return self.linear([name], (rows,), columns, bias=bias and self.shard.number == 0, inputs=inputs)

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
        heads, kv_heads = config.heads // self.shard.of, len(self._kv_heads)
        return AttentionSpec(heads, kv_heads, config.head_dim, scale, window, softcap)

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
        q, kv = self.config.heads * spec.head_dim, self.config.kv_heads * spec.head_dim
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        qkv = self.linear(names, (q, kv, kv), self.hidden, bias=qkv_bias, outputs=self.qkv_outputs)
        return SelfAttention(
            spec=spec,
            rotary=rotary,
            qkv=qkv,
            out=self.linear_back(f"{prefix}.o_proj", self.hidden, q, self.shard.share(q), bias=out_bias),
            query_norm=head_norm(f"{prefix}.q_norm", spec.head_dim) if head_norm else None,
            key_norm=head_norm(f"{prefix}.k_norm", spec.head_dim) if head_norm else None,
        )

    @property
    def qkv_outputs(self) -> list[range]:
        """The shard's outputs among queries, keys and values of all heads side by side."""
        config, size = self.config, self.config.head_dim
        q, kv = config.heads * size, config.kv_heads * size
        kept = scaled(self._kv_heads, size)
        return side_by_side((q, self.shard.share(q)), (kv, kept), (kv, kept))

    def inner(self, size: int) -> range:
        """The shard's part of an MLP that is `size` wide inside."""
        return self.shard.equal_share(size, "intermediate size")

    def gate_up_outputs(self, size: int) -> list[range]:
        """The shard's outputs among gate and up side by side, of an MLP that is `size` wide inside."""
        return side_by_side((size, self.inner(size)), (size, self.inner(size)))

    def mlp(self, prefix: str, activation: Activation, *, bias: bool = False) -> GatedMlp:
        """`{prefix}.{gate,up,down}_proj`."""
        size = self.config.fields.positive("intermediate_size")
        return self.gated_mlp(prefix, activation, size, ("gate_proj", "up_proj", "down_proj"), bias=bias)

    def gated_mlp(
        self,
        prefix: str,
        activation: Activation,
        size: int,
        names: tuple[str, str, str],
        *,
        bias: bool = False,
    ) -> GatedMlp:
        """An MLP that is `size` wide inside; `names` are those of gate, up and down under `prefix`."""
        gate, up, down = (f"{prefix}.{name}" for name in names)
        return GatedMlp(
            gate_up=self.linear(
                [gate, up], (size, size), self.hidden, bias=bias, outputs=self.gate_up_outputs(size)
            ),
            down=self.linear_back(down, self.hidden, size, self.inner(size), bias=bias),
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
        size = config.vocab_size
        vocabulary = self.shard.share(size)
        kept = _part(slice(vocabulary.start, vocabulary.stop))
        embedding = self.weights.take("model.embed_tokens.weight", size, self.hidden, part=kept)
        if config.tied_embeddings and "lm_head.weight" not in self.weights:
            head = Linear(embedding)
        else:
            head = self.linear(["lm_head"], (size,), self.hidden, outputs=(vocabulary,))
        layers = []
        for number in range(config.layers):
            layers.append(layer(number))
            self._report(number + 1, config.layers)
        return Decoder(
            config,
            embedding=embedding,
            first_token=vocabulary.start,
            layers=layers,
            norm=norm or self.norm("model.norm"),
            head=head,
            fingerprint=fingerprint,
            embedding_scale=embedding_scale,
            logits_softcap=logits_softcap,
        )


def _part(*kept: slice) -> Part:
    return lambda tensor: tensor[kept]
