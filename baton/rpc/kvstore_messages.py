"""How KV events and workers look on the wire, and which messages of theirs are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from baton.errors import InvalidRequest
from baton.kv.events import Cleared, Event, PackedIds, Removed, Stored, Tier, WorkerEvents
from baton.kv.hashing import BLOCK_ID_BYTES
from baton.routing.view import Curve, Role, WorkerView
from baton.rpc.v1 import kvstore_pb2, worker_pb2

MAX_BLOCKS = 65_536
"""Block ids in one IndexEvents message at most (1 MiB of ids); more are refused."""

MAX_EVENTS = 16_384
"""Events in one IndexEvents message at most."""

_MAX_NAME = 256
_MAX_CURVE_POINTS = 256
ROLES = {
    worker_pb2.ROLE_PREFILL: Role.PREFILL,
    worker_pb2.ROLE_DECODE: Role.DECODE,
    worker_pb2.ROLE_HYBRID: Role.HYBRID,
}
ROLE_NUMBERS = {role: number for number, role in ROLES.items()}


def encode_events(message: WorkerEvents) -> kvstore_pb2.IndexEvents:
    """The message for the wire; neighbouring events of the same kind and tier become one."""
    wire = kvstore_pb2.IndexEvents(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        sequence=message.sequence,
        snapshot=message.snapshot,
    )
    kind: type[Event] | None = None
    tier: Tier | None = None
    ids: list[bytes] = []
    for event in message.events:
        if isinstance(event, Cleared):
            _flush(wire, kind, tier, ids)
            kind, tier, ids = None, None, []
            cleared = kvstore_pb2.TIER_UNSPECIFIED if event.tier is None else _wire_tier(event.tier)
            wire.events.add(kind=kvstore_pb2.IndexEvent.CLEARED, tier=cleared)
            continue
        if (type(event), event.tier) != (kind, tier):
            _flush(wire, kind, tier, ids)
            kind, tier, ids = type(event), event.tier, []
        ids.extend(event.block_ids)
    _flush(wire, kind, tier, ids)
    return wire


def _flush(
    wire: kvstore_pb2.IndexEvents, kind: type[Event] | None, tier: Tier | None, ids: Sequence[bytes]
) -> None:
    if tier is not None and ids:
        number = kvstore_pb2.IndexEvent.STORED if kind is Stored else kvstore_pb2.IndexEvent.REMOVED
        wire.events.add(kind=number, tier=_wire_tier(tier), block_ids=b"".join(ids))


def _wire_tier(tier: Tier) -> kvstore_pb2.Tier.ValueType:
    return kvstore_pb2.Tier.ValueType(tier.value)


def decode_events(wire: kvstore_pb2.IndexEvents) -> WorkerEvents:
    """The message as values.

    Raises:
        InvalidRequest: a name is empty or too long, ids are not whole, a kind or tier is unknown, or
            there is more than one message may carry.
    """
    _check_name("worker_id", wire.worker_id)
    _check_name("incarnation", wire.incarnation)
    if wire.snapshot and wire.sequence == 0:
        raise InvalidRequest("sequence of a snapshot must be at least 1", field="sequence")
    if len(wire.events) > MAX_EVENTS:
        raise InvalidRequest(
            f"events: {len(wire.events)} in one message, at most {MAX_EVENTS}", field="events"
        )
    message = WorkerEvents(
        wire.worker_id,
        wire.incarnation,
        wire.sequence,
        wire.snapshot,
        tuple(_decode_event(event) for event in wire.events),
    )
    if message.blocks() > MAX_BLOCKS:
        raise InvalidRequest(
            f"block_ids: {message.blocks()} in one message, at most {MAX_BLOCKS}; send several",
            field="block_ids",
        )
    return message


def encode_chains(chains: Iterable[Sequence[bytes]]) -> Iterator[kvstore_pb2.FoundChains]:
    """Chains of block ids as messages of at most `MAX_BLOCKS` ids; longer chains are cut off at that."""
    packed: list[bytes] = []
    blocks = 0
    for chain in chains:
        ids = chain[:MAX_BLOCKS]
        if blocks + len(ids) > MAX_BLOCKS:
            yield kvstore_pb2.FoundChains(chains=packed)
            packed, blocks = [], 0
        packed.append(b"".join(ids))
        blocks += len(ids)
    if packed:
        yield kvstore_pb2.FoundChains(chains=packed)


def decode_chains(wire: kvstore_pb2.FoundChains) -> list[PackedIds]:
    """The chains of a message.

    Raises:
        InvalidRequest: ids are not whole, or there are more than one message may carry.
    """
    if sum(map(len, wire.chains)) > MAX_BLOCKS * BLOCK_ID_BYTES:
        raise InvalidRequest(f"chains: at most {MAX_BLOCKS} block ids in one message", field="chains")
    return [_ids("chains", raw) for raw in wire.chains]


def _ids(field: str, raw: bytes) -> PackedIds:
    if len(raw) % BLOCK_ID_BYTES:
        raise InvalidRequest(f"{field} has {len(raw)} bytes, not a multiple of {BLOCK_ID_BYTES}", field=field)
    return PackedIds(raw)


def _decode_event(wire: kvstore_pb2.IndexEvent) -> Event:
    if wire.kind == kvstore_pb2.IndexEvent.CLEARED:
        return Cleared(None if wire.tier == kvstore_pb2.TIER_UNSPECIFIED else _tier(wire.tier))
    if wire.kind not in (kvstore_pb2.IndexEvent.STORED, kvstore_pb2.IndexEvent.REMOVED):
        raise InvalidRequest(f"kind {wire.kind} is not one of STORED, REMOVED, CLEARED", field="kind")
    ids = _ids("block_ids", wire.block_ids)
    tier = _tier(wire.tier)
    return Stored(ids, tier) if wire.kind == kvstore_pb2.IndexEvent.STORED else Removed(ids, tier)


def _tier(wire: int) -> Tier:
    try:
        return Tier(wire)
    except ValueError:
        raise InvalidRequest(f"tier {wire} is not one of DEVICE, HOST, DISK", field="tier") from None


def check_worker(worker: kvstore_pb2.Worker) -> None:
    """Refuse a worker that nobody could use.

    Raises:
        InvalidRequest: names the field.
    """
    _check_name("worker_id", worker.worker_id)
    _check_name("incarnation", worker.incarnation)
    _check_name("address", worker.address)
    if worker.role not in ROLES:
        raise InvalidRequest(f"role {worker.role} is not one of PREFILL, DECODE, HYBRID", field="role")
    for field, curve in (("prefill_curve", worker.prefill_curve), ("decode_curve", worker.decode_curve)):
        sizes = [point.size for point in curve]
        if len(sizes) > _MAX_CURVE_POINTS or sizes != sorted(set(sizes)) or 0 in sizes:
            raise InvalidRequest(
                f"{field} needs ascending sizes from 1, at most {_MAX_CURVE_POINTS}", field=field
            )
        if not all(0 <= point.seconds < float("inf") for point in curve):
            raise InvalidRequest(f"{field} needs seconds that are finite and not negative", field=field)


def _check_name(field: str, value: str) -> None:
    if not value or len(value) > _MAX_NAME:
        raise InvalidRequest(f"{field} must have 1 to {_MAX_NAME} characters, got {len(value)}", field=field)


def worker_view(
    worker: kvstore_pb2.Worker,
    load: worker_pb2.WorkerLoad,
    draining: bool = False,
    read_bytes_per_s: Mapping[str, float] = MappingProxyType({}),
) -> WorkerView:
    """What routing sees of a worker that `check_worker` has let through.

    A worker that has not reported its load yet counts as empty. Bandwidths that are no positive, finite
    numbers count as not measured.
    """
    reported = load.total_blocks > 0
    return WorkerView(
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        address=worker.address,
        role=ROLES[worker.role],
        total_blocks=worker.total_blocks,
        free_blocks=load.free_blocks if reported else worker.total_blocks,
        cached_blocks=load.cached_blocks,
        running=load.running,
        waiting=load.waiting,
        queued_tokens=load.queued_tokens,
        draining=draining,
        prefill_curve=_curve(worker.prefill_curve),
        decode_curve=_curve(worker.decode_curve),
        itl_target_s=_positive(worker.itl_target_s),
        step_factor=step_factor(load),
        read_bytes_per_s={peer: rate for peer, rate in read_bytes_per_s.items() if 0 < rate < float("inf")},
        host_bytes_per_s=_positive(worker.host_bytes_per_s),
        disk_bytes_per_s=_positive(worker.disk_bytes_per_s),
    )


def step_factor(load: worker_pb2.WorkerLoad) -> float:
    """What the worker's steps take, as a multiple of its curves; 1 where it has not said so sensibly."""
    return load.step_factor if 0 < load.step_factor < float("inf") else 1.0


def _positive(value: float) -> float:
    return value if 0 < value < float("inf") else 0.0


def _curve(points: Sequence[kvstore_pb2.CurvePoint]) -> Curve:
    return Curve.measured((float(point.size), point.seconds) for point in points)
