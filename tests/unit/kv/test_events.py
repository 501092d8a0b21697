"""Packing of events into messages, admission in order, and the way over the wire and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.events import (
    Cleared,
    Event,
    PackedIds,
    Removed,
    SequenceGate,
    Stored,
    Tier,
    Verdict,
    WorkerEvents,
    pack,
)
from baton.rpc.kvstore_messages import (
    MAX_BLOCKS,
    decode_chains,
    decode_events,
    encode_chains,
    encode_events,
    worker_view,
)
from baton.rpc.v1 import kvstore_pb2, worker_pb2

ids = st.lists(st.binary(min_size=16, max_size=16), max_size=12).map(tuple)
tiers = st.sampled_from(Tier)
events = st.one_of(
    st.builds(Stored, ids, tiers),
    st.builds(Removed, ids, tiers),
    st.builds(Cleared, st.none() | tiers),
)


def one_by_one(sequence: tuple[Event, ...] | list[Event]) -> list[Event]:
    """The same events, each about a single block."""
    return [
        part
        for event in sequence
        for part in (
            [event]
            if isinstance(event, Cleared)
            else [type(event)((i,), event.tier) for i in event.block_ids]
        )
    ]


@given(st.lists(events, max_size=12), st.integers(1, 9), st.integers(1, 5))
def test_packing_keeps_every_event_in_order_within_its_limits(
    sequence: list[Event], max_blocks: int, max_events: int
) -> None:
    pieces = list(pack(sequence, max_blocks, max_events))
    assert pieces
    assert [part for piece in pieces for part in one_by_one(piece)] == one_by_one(sequence)
    for piece in pieces:
        assert WorkerEvents("w", "1", 1, False, piece).blocks() <= max_blocks
        assert len(piece) <= max_events


@given(ids.filter(bool), st.integers(1, 5))
def test_packing_fills_every_message_but_the_last(block_ids: tuple[bytes, ...], max_blocks: int) -> None:
    pieces = list(pack([Stored(block_ids), Stored(block_ids, Tier.HOST)], max_blocks, 100))
    assert len(pieces) == -(-2 * len(block_ids) // max_blocks)


@given(st.lists(events, max_size=12).map(tuple), st.booleans(), st.integers(1, 2**64 - 1))
def test_the_wire_carries_everything(sequence: tuple[Event, ...], snapshot: bool, number: int) -> None:
    message = WorkerEvents("worker", "7", number, snapshot, sequence)
    wire = kvstore_pb2.IndexEvents.FromString(encode_events(message).SerializeToString())
    back = decode_events(wire)
    assert one_by_one(back.events) == one_by_one(sequence)
    assert (back.worker_id, back.incarnation, back.sequence, back.snapshot) == (
        "worker",
        "7",
        number,
        snapshot,
    )


@given(st.lists(ids, max_size=6))
def test_found_chains_come_over_the_wire_as_they_were(chains: list[tuple[bytes, ...]]) -> None:
    wires = list(encode_chains(chains))
    assert len(wires) == bool(chains)
    assert [list(chain) for wire in wires for chain in decode_chains(wire)] == [list(c) for c in chains]


def test_found_chains_travel_in_messages_of_so_many_blocks() -> None:
    half, too_long = [bytes(16)] * (MAX_BLOCKS // 2), [bytes(16)] * (MAX_BLOCKS + 1)
    lengths = [[len(c) for c in decode_chains(w)] for w in encode_chains([half, half, half, too_long])]
    assert lengths == [[MAX_BLOCKS // 2] * 2, [MAX_BLOCKS // 2], [MAX_BLOCKS]]


def test_neighbouring_events_of_a_kind_travel_as_one() -> None:
    blocks = [bytes([n]) * 16 for n in range(4)]
    sequence = [Stored((block_id,)) for block_id in blocks] + [Removed((blocks[3],))]
    wire = encode_events(WorkerEvents("w", "1", 1, False, tuple(sequence)))
    assert [event.block_ids for event in wire.events] == [b"".join(blocks), blocks[3]]


@pytest.mark.parametrize(
    ("incarnation", "sequence", "snapshot", "verdict"),
    [
        ("1", 6, False, Verdict.APPLY),
        ("1", 5, False, Verdict.DUPLICATE),
        ("1", 2, False, Verdict.DUPLICATE),
        ("1", 7, False, Verdict.RESYNC),
        ("2", 1, False, Verdict.RESYNC),
        ("2", 6, False, Verdict.RESYNC),
        ("2", 1, True, Verdict.REPLACE),
        ("1", 9, True, Verdict.REPLACE),
        ("1", 5, True, Verdict.REPLACE),
    ],
)
def test_the_gate_after_five_messages(
    incarnation: str, sequence: int, snapshot: bool, verdict: Verdict
) -> None:
    gate = SequenceGate()
    assert gate.admit(WorkerEvents("w", "1", 1, False, ())) is Verdict.RESYNC
    assert gate.admit(WorkerEvents("w", "1", 1, True, ())) is Verdict.REPLACE
    for number in range(2, 6):
        assert gate.admit(WorkerEvents("w", "1", number, False, ())) is Verdict.APPLY
    before = gate.position("w")
    assert gate.admit(WorkerEvents("w", incarnation, sequence, snapshot, ())) is verdict
    moved = gate.position("w")
    assert moved is not None
    if verdict in (Verdict.APPLY, Verdict.REPLACE):
        assert (moved.incarnation, moved.sequence) == (incarnation, sequence)
    else:
        assert moved == before
    gate.forget("w")
    assert gate.admit(WorkerEvents("w", "1", 6, False, ())) is Verdict.RESYNC


def test_a_worker_without_a_load_report_counts_as_empty() -> None:
    worker = kvstore_pb2.Worker(
        worker_id="w", incarnation="1", address="a:1", role=worker_pb2.ROLE_PREFILL, total_blocks=9
    )
    worker.prefill_curve.add(size=16, seconds=0.5)
    empty = worker_view(worker, worker_pb2.WorkerLoad())
    assert empty.free_blocks == 9
    assert empty.prefill_curve.seconds(16) == 0.5
    full = worker_view(worker, worker_pb2.WorkerLoad(total_blocks=9, free_blocks=0, running=4))
    assert (full.free_blocks, full.running) == (0, 4)


def test_packed_ids_are_a_sequence_of_ids() -> None:
    ids = [bytes([number]) * 16 for number in range(5)]
    packed = PackedIds(b"".join(ids))
    assert packed == ids
    assert list(packed) == ids
    assert [packed[at] for at in range(-5, 5)] == ids + ids
    assert packed[1:3] == ids[1:3]
    assert packed[::-2] == ids[::-2]
    assert packed[4:2] == []
    assert packed != ids[:4]
