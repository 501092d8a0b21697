"""The backend of a kvstore whose knowledge outlives it: a Redis that mirrors members and blocks.

Schema, version 1. All keys begin with `baton:1:`; the worker id in braces keeps the keys of one worker
on one node of a Redis Cluster.

    baton:1:workers              set      ids of the workers there are
    baton:1:{<worker id>}:member hash     `change`: a RegistryUpdate.Change as protobuf
                                          `incarnation`, `sequence`: how far `blocks` has come;
                                          sequence is `partial` while several writes make up one step
    baton:1:{<worker id>}:blocks hash     block id (16 bytes) -> tiers, the sum of 1 << tier as decimal

Both keys of a worker expire `RETENTION_S` after its last sign of life. Every write is one script that
checks where the key stands before it moves it, so a worker's blocks and sequence always agree, and a
Redis that lost writes is noticed and written anew. One kvstore writes at a time; two clusters share a
Redis by using different databases of it (the number that ends the URL).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

from google.protobuf.message import DecodeError
from redis.exceptions import RedisClusterException, RedisError

from baton.errors import InvalidRequest
from baton.kv.events import Position, Tier
from baton.kv.hashing import BLOCK_ID_BYTES
from baton.rpc.kvstore_messages import check_worker
from baton.rpc.v1 import kvstore_pb2
from services.kvstore.backend import Backend
from services.kvstore.member import Holdings, Member
from services.kvstore.metrics import RedisMetrics
from services.kvstore.redis_url import TIMEOUT_S, connect

log = logging.getLogger(__name__)

PREFIX = "baton:1:"
RETENTION_S = 300
_PARTIAL = "partial"
_BLOCKS_PER_WRITE = 4096
_WRITES_PER_ROUND = 16
_SCAN_COUNT = 4096
_LOAD_TIMEOUT_S = 10.0
_ROUND_PAUSE_S = 0.05
_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 8.0
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
_ALL_TIERS = sum(1 << tier for tier in Tier)

# KEYS: member, blocks. ARGV: mode, incarnation, expected sequence, new sequence, retention, change,
# then pairs of block id and tiers (0: remove). Returns 0 when the keys are not where they should be.
_WRITE = """
local mode, incarnation = ARGV[1], ARGV[2]
if mode == 'replace' then
  redis.call('UNLINK', KEYS[2])
else
  local at = redis.call('HMGET', KEYS[1], 'incarnation', 'sequence')
  if at[1] ~= incarnation or at[2] ~= ARGV[3] then return 0 end
end
redis.call('HSET', KEYS[1], 'incarnation', incarnation, 'sequence', ARGV[4], 'change', ARGV[6])
local held, gone = {}, {}
for i = 7, #ARGV, 2 do
  if ARGV[i + 1] == '0' then gone[#gone + 1] = ARGV[i]
  else held[#held + 1] = ARGV[i]; held[#held + 1] = ARGV[i + 1] end
end
for i = 1, #held, 1000 do redis.call('HSET', KEYS[2], unpack(held, i, math.min(i + 999, #held))) end
for i = 1, #gone, 1000 do redis.call('HDEL', KEYS[2], unpack(gone, i, math.min(i + 999, #gone))) end
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
return 1
"""

# KEYS: member, blocks. ARGV: incarnation. A later incarnation's keys stay.
_REMOVE = """
local at = redis.call('HGET', KEYS[1], 'incarnation')
if at and at ~= ARGV[1] then return 0 end
redis.call('UNLINK', KEYS[1], KEYS[2])
return 1
"""


@dataclass
class _Mirror:
    """What Redis has of one member, and what it still lacks."""

    member: Member
    written: str = ""
    rewrite: bool = True
    changed: set[bytes] = field(default_factory=set)


@dataclass(frozen=True)
class _Write:
    """One call of the write script."""

    mirror: _Mirror
    mode: str
    expected: str
    sequence: str
    blocks: Sequence[tuple[bytes, int]]


class RedisBackend(Backend):
    """Mirrors members in Redis, behind the kvstore's memory and never in front of it.

    Changes collect per member as the set of blocks that changed; every round writes what has collected.
    When Redis fails, everything is written anew once it is back: what it holds then is not known.
    """

    def __init__(self, url: str, metrics: RedisMetrics) -> None:
        """
        Raises:
            BadSetting: `url` names no Redis (see `redis_url`).
        """
        self._redis: Any = connect(url)
        self._metrics = metrics
        self._mirrors: dict[str, _Mirror] = {}
        self._dirty: dict[str, None] = {}
        self._gone: dict[str, Member] = {}
        self._work = asyncio.Event()
        self._up = True

    # ---- notes --------------------------------------------------------------------------------

    def member_changed(self, member: Member) -> None:
        mirror = self._mirrors.get(member.worker_id)
        if mirror is None or mirror.member is not member:
            self._mirrors[member.worker_id] = _Mirror(member)
        self._gone.pop(member.worker_id, None)
        self._note(member.worker_id)

    def blocks_changed(self, member: Member, block_ids: Iterable[bytes]) -> None:
        mirror = self._mirrors[member.worker_id]
        if not mirror.rewrite:
            mirror.changed.update(block_ids)
            # More changes than blocks: writing all is cheaper, and memory stays bounded by the index.
            if len(mirror.changed) > len(member.holdings) + _BLOCKS_PER_WRITE:
                mirror.rewrite, mirror.changed = True, set()
        self._note(member.worker_id)

    def blocks_replaced(self, member: Member) -> None:
        mirror = self._mirrors[member.worker_id]
        mirror.rewrite, mirror.changed = True, set()
        self._note(member.worker_id)

    def member_gone(self, member: Member) -> None:
        self._mirrors.pop(member.worker_id, None)
        self._dirty.pop(member.worker_id, None)
        self._gone[member.worker_id] = member
        self._work.set()

    def _note(self, worker_id: str) -> None:
        self._dirty[worker_id] = None
        self._work.set()

    # ---- writing ------------------------------------------------------------------------------

    async def run(self) -> None:
        pause_s = 0.0
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                await self._round()
                # What failed is written anew as a whole, so a Redis in trouble is not pressed.
                pause_s = _ROUND_PAUSE_S if self._up else max(_FIRST_RETRY_S, min(2 * pause_s, _LAST_RETRY_S))
                await asyncio.sleep(pause_s)
        finally:
            # The last moments. Which writes of a round cut short have arrived is not known, so every
            # member is checked, and those that Redis turns out to lack are written anew.
            self._dirty = dict.fromkeys(self._mirrors)
            with suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT_S):
                    await self._round()
                    while self._dirty and self._up:
                        await self._round()
            await self._redis.aclose()

    async def _round(self) -> None:
        """Write everything noted so far; on failure leave it noted."""
        try:
            await self._carry_over()
        except _FAILURES as error:
            self._metrics.failures.inc()
            self._set_up(False, error)
            for worker_id, mirror in self._mirrors.items():
                mirror.rewrite, mirror.changed = True, set()
                self._dirty[worker_id] = None
            self._work.set()
        else:
            self._set_up(True)

    def _set_up(self, up: bool, error: Exception | None = None) -> None:
        if not up and self._up:
            log.warning("Redis is away, going on from memory: %s", error)
        elif up and not self._up:
            log.info("Redis is back and has been written anew")
        self._up = up
        self._metrics.up.set(up)

    async def _carry_over(self) -> None:
        for worker_id, member in list(self._gone.items()):
            await self._redis.eval(_REMOVE, 2, *_keys(worker_id), member.incarnation)
            await self._redis.srem(f"{PREFIX}workers", worker_id)
            if self._gone.get(worker_id) is member:
                del self._gone[worker_id]
        dirty, self._dirty = self._dirty, {}
        mirrors = [mirror for mirror in map(self._mirrors.get, dirty) if mirror is not None]
        new = [mirror.member.worker_id for mirror in mirrors if mirror.rewrite]
        if new:
            await self._redis.sadd(f"{PREFIX}workers", *new)
        # What a member is when its writes are made counts, so that is done in one go for each.
        writes = (write for mirror in mirrors for write in _writes(mirror))
        while batch := list(islice(writes, _WRITES_PER_ROUND)):
            await self._send(batch)

    async def _send(self, batch: Sequence[_Write]) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for write in batch:
                member = write.mirror.member
                blocks = [part for block_id, tiers in write.blocks for part in (block_id, str(tiers))]
                # By its text rather than its hash: a node that has never seen the script needs no round more.
                pipeline.eval(
                    _WRITE,
                    2,
                    *_keys(member.worker_id),
                    write.mode,
                    member.incarnation,
                    write.expected,
                    write.sequence,
                    RETENTION_S,
                    member.change().SerializeToString(),
                    *blocks,
                )
            answers = await pipeline.execute()
        for write, answer in zip(batch, answers, strict=True):
            if answer == 1:
                self._metrics.blocks.inc(len(write.blocks))
            else:
                log.warning("Redis lost writes of worker %s, writing it anew", write.mirror.member.worker_id)
                write.mirror.rewrite, write.mirror.changed = True, set()
                self._note(write.mirror.member.worker_id)

    # ---- reading ------------------------------------------------------------------------------

    async def load(self) -> Sequence[Member]:
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT_S):
                members = await self._load()
        except _FAILURES as error:
            self._metrics.failures.inc()
            self._set_up(False, error)
            return ()
        self._set_up(True)
        for member in members:
            self._mirrors[member.worker_id] = _Mirror(member, _sequence(member), member.position is None)
        blocks = sum(len(member.holdings) for member in members)
        log.info("read %d workers and %d blocks from Redis", len(members), blocks)
        return members

    async def _load(self) -> list[Member]:
        members = []
        for raw in sorted(await self._redis.smembers(f"{PREFIX}workers")):
            worker_id = cast(bytes, raw).decode()
            member_key, blocks_key = _keys(worker_id)
            member = _parse(cast(dict[bytes, bytes], await self._redis.hgetall(member_key)))
            if member is None:
                await self._redis.srem(f"{PREFIX}workers", worker_id)
                continue
            if member.position is not None:
                blocks: dict[bytes, int] = {}
                async for block_id, tiers in self._redis.hscan_iter(blocks_key, count=_SCAN_COUNT):
                    if len(block_id) == BLOCK_ID_BYTES and tiers.isdigit():
                        blocks[block_id] = int(tiers) & _ALL_TIERS
                member.holdings = Holdings(blocks)
            members.append(member)
        return members


def _keys(worker_id: str) -> list[str]:
    return [f"{PREFIX}{{{worker_id}}}:member", f"{PREFIX}{{{worker_id}}}:blocks"]


def _sequence(member: Member) -> str:
    return "0" if member.position is None else str(member.position.sequence)


def _writes(mirror: _Mirror) -> Iterator[_Write]:
    """The writes that bring Redis to where the member is now, blocks in bounded pieces."""
    member, holdings = mirror.member, mirror.member.holdings
    ids = holdings.ids() if mirror.rewrite else list(mirror.changed)
    blocks = [(block_id, holdings.tiers(block_id)) for block_id in ids]
    mode = "replace" if mirror.rewrite else "extend"
    expected, final = mirror.written, _sequence(member)
    mirror.written, mirror.rewrite, mirror.changed = final, False, set()
    starts = range(0, max(1, len(blocks)), _BLOCKS_PER_WRITE)
    for start in starts:
        sequence = final if start == starts[-1] else _PARTIAL
        yield _Write(mirror, mode, expected, sequence, blocks[start : start + _BLOCKS_PER_WRITE])
        mode, expected = "extend", sequence


def _parse(stored: dict[bytes, bytes]) -> Member | None:
    """The member as it was stored, or None when it cannot be used."""
    try:
        change = kvstore_pb2.RegistryUpdate.Change.FromString(stored[b"change"])
        check_worker(change.worker)
    except (KeyError, DecodeError, InvalidRequest):
        return None
    sequence = stored.get(b"sequence", b"")
    position = None
    if sequence.isdigit() and int(sequence) > 0:
        position = Position(change.worker.incarnation, int(sequence))
    return Member(change.worker, change.load, change.draining, confirmed=False, position=position)
