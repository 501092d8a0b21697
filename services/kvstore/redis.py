"""The backend of a kvstore whose knowledge outlives it: a Redis that mirrors members and blocks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from typing import Any, cast

from google.protobuf.message import DecodeError
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import RedisClusterException, RedisError

from baton.errors import InvalidRequest
from baton.kv.events import PackedIds, Position
from baton.rpc.kvstore_messages import check_worker
from baton.rpc.v1 import kvstore_pb2
from services.kvstore.backend import Backend
from services.kvstore.holdings import Holdings
from services.kvstore.member import Member
from services.kvstore.metrics import RedisMetrics
from services.kvstore.redis_schema import PARTIAL, READ, REMOVE, RETENTION_S, WORKERS, WRITE, keys
from services.kvstore.redis_url import TIMEOUT_S, connect

log = logging.getLogger(__name__)

_BLOCKS_PER_WRITE = 4096
_BLOCKS_PER_BATCH = 65_536
_WRITES_PER_BATCH = 512
_REMOVALS_PER_BATCH = 64
_MAX_GONE = 10_000
_BLOCKS_PER_READ = 4096
_LOAD_TIMEOUT_S = 10.0
_ROUND_PAUSE_S = 0.05
# Sentinels without a master are most likely about to have one again.
_NO_MASTER_PAUSE_S = 0.2
_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 8.0
_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)


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
        self._gone: dict[str, str] = {}
        self._work = asyncio.Event()
        self._up = True
        self._lost = False
        self._told_of_loss = False
        self._behind_since: float | None = None
        metrics.lag_s.set_function(self._lag_s)

    def _lag_s(self) -> float:
        since = self._behind_since
        return 0.0 if since is None else monotonic() - since

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
        self._gone[member.worker_id] = member.incarnation
        if len(self._gone) > _MAX_GONE:
            del self._gone[next(iter(self._gone))]  # its keys expire
        self._wake()

    def _note(self, worker_id: str) -> None:
        self._dirty[worker_id] = None
        self._wake()

    def _wake(self) -> None:
        if self._behind_since is None:
            self._behind_since = monotonic()
        self._work.set()

    # ---- writing ------------------------------------------------------------------------------

    async def run(self) -> None:
        pause_s = 0.0
        task = asyncio.current_task()
        assert task is not None
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                await self._round()
                # redis-py writes in `asyncio.wait_for`, which before Python 3.12 may lose a cancellation.
                if task.cancelling():
                    return
                # What failed is written anew as a whole, so a Redis in trouble is not pressed.
                if self._up and not self._lost:
                    pause_s = _ROUND_PAUSE_S
                else:
                    pause_s = max(_FIRST_RETRY_S, min(2 * pause_s, _LAST_RETRY_S))
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
        began_s = monotonic()
        self._lost = False
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
            self._told_of_loss = self._told_of_loss and self._lost
            if not self._lost:
                self._behind_since = began_s if self._dirty or self._gone else None

    def _set_up(self, up: bool, error: Exception | None = None) -> None:
        if not up and self._up:
            log.warning("Redis is away, going on from memory: %s", error)
        elif up and not self._up:
            log.info("Redis is back and has been written anew")
        self._up = up
        self._metrics.up.set(up)

    async def _carry_over(self) -> None:
        while self._gone:
            await self._remove(list(islice(self._gone.items(), _REMOVALS_PER_BATCH)))
        dirty, self._dirty = self._dirty, {}
        mirrors = [mirror for mirror in map(self._mirrors.get, dirty) if mirror is not None]
        # What a member is when its writes are made counts, so that is done in one go for each.
        batch: list[_Write] = []
        blocks = 0
        for mirror in mirrors:
            for write in _writes(mirror):
                batch.append(write)
                blocks += len(write.blocks)
                if blocks >= _BLOCKS_PER_BATCH or len(batch) == _WRITES_PER_BATCH:
                    await self._send(batch)
                    batch, blocks = [], 0
        if batch:
            await self._send(batch)

    async def _remove(self, gone: Sequence[tuple[str, str]]) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for worker_id, incarnation in gone:
                pipeline.eval(REMOVE, 2, *keys(worker_id), incarnation)
            answers = await pipeline.execute()
        # A worker that another kvstore has written since stays in its list.
        removed = [worker_id for (worker_id, _), answer in zip(gone, answers, strict=True) if answer == 1]
        if removed:
            await self._redis.srem(WORKERS, *removed)
        for worker_id, incarnation in gone:
            if self._gone.get(worker_id) == incarnation:
                del self._gone[worker_id]

    async def _send(self, batch: Sequence[_Write]) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            # With every write, over the same connection: nothing else would bring back a name that was lost.
            pipeline.sadd(WORKERS, *{write.mirror.member.worker_id for write in batch})
            for write in batch:
                member = write.mirror.member
                blocks = [part for block_id, tiers in write.blocks for part in (block_id, str(tiers))]
                # By its text rather than its hash: a node that has never seen the script needs no round more.
                pipeline.eval(
                    WRITE,
                    2,
                    *keys(member.worker_id),
                    write.mode,
                    member.incarnation,
                    write.expected,
                    write.sequence,
                    RETENTION_S,
                    member.change().SerializeToString(),
                    *blocks,
                )
            _, *answers = await pipeline.execute()
        for write, answer in zip(batch, answers, strict=True):
            if answer == 1:
                self._metrics.blocks.inc(len(write.blocks))
            else:
                self._write_anew(write.mirror)

    def _write_anew(self, mirror: _Mirror) -> None:
        """Redis does not have what was written to it."""
        if not mirror.rewrite:
            self._metrics.lost.inc()
        mirror.rewrite, mirror.changed = True, set()
        self._lost = True
        self._note(mirror.member.worker_id)
        if not self._told_of_loss:
            self._told_of_loss = True
            log.warning(
                "Redis lost writes of worker %s, writing anew what it lacks; unless it was emptied or failed "
                "over, its maxmemory-policy evicts keys, or another kvstore writes to the same database",
                mirror.member.worker_id,
            )

    # ---- reading ------------------------------------------------------------------------------

    async def load(self) -> Sequence[Member]:
        members: list[Member] = []
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT_S):
                await self._await_master()
                await self._load(members)
        except _FAILURES as error:
            self._metrics.failures.inc()
            self._set_up(False, error)
        else:
            self._set_up(True)
        for member in members:
            self._mirrors[member.worker_id] = _Mirror(member, _sequence(member), member.position is None)
        blocks = sum(len(member.holdings) for member in members)
        log.info("read %d workers and %d blocks from Redis", len(members), blocks)
        return members

    async def _await_master(self) -> None:
        """Sit out a failover; whatever else is wrong shows when something is read."""
        while True:
            try:
                await self._redis.ping()
            except MasterNotFoundError:
                await asyncio.sleep(_NO_MASTER_PAUSE_S)
            except _FAILURES:
                return
            else:
                return

    async def _load(self, members: list[Member]) -> None:
        """Append one member after the other: what cannot be read in time comes from the workers."""
        for raw in sorted(await self._redis.smembers(WORKERS)):
            worker_id = cast(bytes, raw).decode(errors="replace")
            stored = cast(dict[bytes, bytes], await self._redis.hgetall(keys(worker_id)[0]))
            member = _parse(stored)
            if member is None:
                await self._redis.srem(WORKERS, raw)
                continue
            if member.position is not None:
                blocks = await self._load_blocks(worker_id)
                now = await self._redis.hget(keys(worker_id)[0], "sequence")
                if now == stored[b"sequence"] and stored.get(b"blocks") == str(len(blocks)).encode():
                    member.holdings = Holdings(blocks)
                else:
                    log.warning("Redis has lost blocks of worker %s, which is asked for them", worker_id)
                    member.position = None
            members.append(member)

    async def _load_blocks(self, worker_id: str) -> dict[bytes, int]:
        blocks: dict[bytes, int] = {}
        cursor = b"0"
        while True:
            key = keys(worker_id)[1]
            cursor, ids, tiers = await self._redis.eval(READ, 1, key, cursor, _BLOCKS_PER_READ)
            blocks.update(zip(PackedIds(ids), tiers, strict=True))
            if cursor == b"0":
                return blocks


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
        sequence = final if start == starts[-1] else PARTIAL
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
    return Member(
        change.worker,
        change.load,
        change.draining,
        dict(change.read_bytes_per_s),
        confirmed=False,
        position=position,
    )
