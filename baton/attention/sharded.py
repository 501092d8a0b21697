"""Attention of a model that is spread over devices: a backend and a pool on each, for some of the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baton.attention.base import Attention, AttentionBackend, AttentionBatch, KvCache
from baton.device import device_of
from baton.kv.hashing import KvLayout


class ShardedAttention(Attention):
    """`shards` in order; block n of the worker is block n of every pool. `whole_block_bytes` are those of a
    block with all `kv_heads`: where heads are fewer than devices, several keep the same."""

    def __init__(self, shards: Sequence[AttentionBackend], whole_block_bytes: int) -> None:
        self.name, self.shards = shards[0].name, tuple(shards)
        self._layout = replace(shards[0].cache.layout, block_bytes=whole_block_bytes)
        self._devices = [device_of(shard.cache.storage.device) for shard in shards]

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def caches(self) -> Sequence[KvCache]:
        return [shard.cache for shard in self.shards]

    def begin(self, batch: AttentionBatch) -> None:
        for shard, device in zip(self.shards, self._devices, strict=True):
            with device.current():
                shard.begin(batch)
