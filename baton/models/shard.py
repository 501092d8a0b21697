"""Which part of a model is on which device, when it is spread over several (tensor parallelism).

As in Megatron-LM (arXiv:1909.08053): a device has some of the attention heads, some of the inner width of
each MLP, and some of the vocabulary. Products into those are cut by their outputs, products out of them by
their inputs, so that two sums over the devices make a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import UnsupportedModel
from baton.kv.heads import heads_of


@dataclass(frozen=True)
class Shard:
    """Part `number` of a model in `of` parts. Ranges it answers count from the whole model's first."""

    number: int = 0
    of: int = 1

    @property
    def is_whole(self) -> bool:
        return self.of == 1

    def share(self, count: int) -> range:
        """Of `count` things, those of this shard; as many as any other's, give or take one."""
        return range(count * self.number // self.of, count * (self.number + 1) // self.of)

    def equal_share(self, count: int, what: str) -> range:
        """As `share`, where all shards must have as many.

        Raises:
            UnsupportedModel: `count` cannot be divided so; `what` it counts is named.
        """
        if count % self.of:
            raise UnsupportedModel(
                f"the model's {what} is {count}, which --tensor-parallel {self.of} does not divide"
            )
        return self.share(count)

    def kv_heads(self, count: int) -> range:
        """The KV heads of this shard; more shards than heads share them.

        Raises:
            UnsupportedModel: neither number divides the other.
        """
        if count % self.of and self.of % count:
            raise UnsupportedModel(
                f"the model has {count} KV heads, which --tensor-parallel {self.of} neither divides "
                "nor is a multiple of"
            )
        return heads_of(self.number, self.of, count)


def side_by_side(*parts: tuple[int, range]) -> list[range]:
    """Where `parts` lie in a product that yields the outputs of several side by side.

    Each is how many outputs there are in the whole model, and which of them are wanted.
    """
    placed, start = [], 0
    for count, wanted in parts:
        placed.append(range(start + wanted.start, start + wanted.stop))
        start += count
    return placed


def scaled(wanted: range, size: int) -> range:
    """The values of `wanted` heads of `size` values each."""
    return range(wanted.start * size, wanted.stop * size)


def within(wanted: Sequence[range], start: int, count: int) -> list[slice]:
    """What of `wanted` lies among the `count` outputs from `start` on, counted from there."""
    end = start + count
    cut = [(max(part.start, start), min(part.stop, end)) for part in wanted]
    return [slice(first - start, last - start) for first, last in cut if first < last]
