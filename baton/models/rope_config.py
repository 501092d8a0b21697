"""Which rotary embedding a config asks for, in the old spelling (rope_theta, rope_scaling) or the new
(rope_parameters). No torch here: how long a context may be depends on it, and the router asks that."""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import UnsupportedModel
from baton.models.fields import Fields
from baton.models.windows import FULL, SLIDING

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding, every default filled in.

    `rotary_dim` is how many of a head's leading dimensions turn. `original_max` is the context the
    model was first trained for; `max_positions` the config's max_position_embeddings.
    `attention_factor` multiplies cos and sin; None means what the type's paper says.
    """

    kind: str
    theta: float
    rotary_dim: int
    max_positions: int
    original_max: int
    factor: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def scale(self) -> float:
        """How many times longer than originally trained the context is."""
        return self.factor if self.factor is not None else self.max_positions / self.original_max

    @property
    def longest(self) -> int:
        """Positions the embedding is made for.

        With yarn that can be more than max_position_embeddings, which model cards tell their users to
        leave as it was. Dynamic scaling is the identity up to max_position_embeddings; beyond, it turns
        every earlier key anew with each token, which no KV cache survives, so it ends there.
        """
        if self.kind == "yarn":
            return max(self.max_positions, int(self.original_max * self.scale))
        return self.max_positions

    @property
    def usual(self) -> int:
        """The context length served unless more is asked for.

        A longrope model has two sets of frequencies, one for sequences within `original_max` and one
        for longer ones. Keys are cached, so a worker must settle on one: the short set, exact for
        every sequence within `original_max`, unless it is told to serve longer ones.
        """
        return min(self.original_max, self.longest) if self.kind == "longrope" else self.longest


def read_rope(config: Fields, head_dim: int, layer_type: str | None = None) -> RopeConfig:
    """The rotary embedding of layers of `layer_type` (None where all layers share one).

    Raises:
        UnsupportedModel: the type is unknown or a parameter it needs is missing or misshapen.
    """
    given = _given(config, layer_type)
    kind = given.given("rope_type") or given.given("type") or "default"
    if config.text("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(
            f"{config.where}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    theta = given.optional_number("rope_theta")
    if theta is None:
        theta = config.number("rope_local_base_freq" if layer_type == SLIDING else "rope_theta")
    partial = given.optional_number("partial_rotary_factor")
    if partial is None:
        partial = config.optional_number("partial_rotary_factor")
    if partial not in (None, 1.0) and config.text("model_type") != "phi3":
        raise UnsupportedModel(f"{config.where}: partial_rotary_factor {partial} is not supported here")
    max_positions = config.positive("max_position_embeddings")
    outer = config.optional_integer("original_max_position_embeddings")
    inner = given.optional_integer("original_max_position_embeddings")
    rope = RopeConfig(
        kind=str(kind),
        theta=theta,
        rotary_dim=int(head_dim * (partial if partial is not None else 1.0)),
        max_positions=max_positions,
        original_max=outer or inner or max_positions,
        factor=given.optional_number("factor"),
        attention_factor=given.optional_number("attention_factor"),
        low_freq_factor=given.number("low_freq_factor") if kind == "llama3" else 1.0,
        high_freq_factor=given.number("high_freq_factor") if kind == "llama3" else 4.0,
        beta_fast=given.optional_number("beta_fast") or 32.0,
        beta_slow=given.optional_number("beta_slow") or 1.0,
        mscale=given.optional_number("mscale"),
        mscale_all_dim=given.optional_number("mscale_all_dim"),
        truncate=given.given("truncate") is not False,
        short_factors=given.numbers("short_factor") if kind == "longrope" else (),
        long_factors=given.numbers("long_factor") if kind == "longrope" else (),
    )
    _check(config, rope)
    return rope


def _given(config: Fields, layer_type: str | None) -> Fields:
    """The object with the type and its parameters; empty where nothing but rope_theta is written."""
    empty = Fields(config.where, {}, {})
    parameters, scaling = config.inner("rope_parameters"), config.inner("rope_scaling")
    if layer_type is None:
        return scaling or parameters or empty
    nested = parameters.inner(layer_type) if parameters is not None else None
    return nested or (scaling if layer_type == FULL else None) or empty


def _check(config: Fields, rope: RopeConfig) -> None:
    if rope.factor is None and rope.kind in ("linear", "dynamic", "llama3"):
        raise UnsupportedModel(f"{config.where}: rope type {rope.kind!r} needs a factor")
    for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
        if rope.kind == "longrope" and len(factors) != rope.rotary_dim // 2:
            raise UnsupportedModel(
                f"{config.where}: rope {name} has {len(factors)} entries and needs {rope.rotary_dim // 2}"
            )
