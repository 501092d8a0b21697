"""How far back each layer looks: sliding windows and which layers have them."""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import UnsupportedModel
from baton.models.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_kinds(fields: Fields, usual: Sequence[str]) -> tuple[str, ...]:
    """`SLIDING` or `FULL` for each layer: `layer_types` as written, else `usual`.

    Raises:
        UnsupportedModel: another kind is written, or the list is as long as the model is not.
    """
    kinds = fields.texts("layer_types") or tuple(usual)
    if len(kinds) != len(usual):
        raise UnsupportedModel(
            f"{fields.where}: layer_types names {len(kinds)} layers, the model has {len(usual)}"
        )
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise UnsupportedModel(f"{fields.where}: layer type {kind!r} is not supported")
    return kinds


def qwen_windows(fields: Fields) -> list[int | None]:
    """Per layer: with use_sliding_window, the layers from max_window_layers on slide."""
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    first = fields.integer("max_window_layers")
    layers = range(fields.positive("num_hidden_layers"))
    usual = [SLIDING if window is not None and number >= first else FULL for number in layers]
    return [window if kind == SLIDING else None for kind in layer_kinds(fields, usual)]
