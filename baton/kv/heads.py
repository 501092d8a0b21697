"""Which heads of every KV block each device keeps, when a worker's model is spread over several."""

from __future__ import annotations


def heads_of(shard: int, shards: int, kv_heads: int) -> range:
    """The KV heads of shard number `shard` of `shards`.

    Each has as many, in order. Of more shards than heads, neighbours keep the same head. One number must be
    a multiple of the other.
    """
    first = shard * kv_heads // shards
    return range(first, first + max(1, kv_heads // shards))
