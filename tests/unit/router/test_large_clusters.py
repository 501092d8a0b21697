"""A router of very many workers weighs few of them, and still finds what matters."""

from __future__ import annotations

from baton.kv.events import Stored, WorkerEvents
from baton.kv.hashing import extend_chain
from baton.routing import Role
from tests.unit.router.fakes import LAYOUT, known
from tests.unit.router.test_parts import generation, placer

MANY = [known(f"p{n}", "x:1", Role.PREFILL) for n in range(300)] + [
    known(f"d{n}", "x:1", Role.DECODE) for n in range(300)
]


def test_the_holder_of_a_prefix_is_found_among_very_many() -> None:
    place, cluster = placer("prefix", *MANY)
    chain = extend_chain(LAYOUT.root(""), list(range(160)), 16)
    cluster.index.apply(WorkerEvents("d123", "one", 1, True, (Stored(chain),)))
    hold = place.place(generation(160), [], frozenset())
    assert hold.placement.decode.worker_id == "d123"


def test_work_spreads_over_very_many() -> None:
    place, _ = placer("prefix", *MANY)
    holds = [place.place(generation(160, salt=str(n)), [], frozenset()) for n in range(200)]
    assert len({hold.placement.decode.worker_id for hold in holds}) > 150


def test_who_is_alone_able_to_is_found_though_nobody_named_it() -> None:
    small = [known(f"d{n}", "x:1", Role.DECODE, total_blocks=8) for n in range(300)]
    place, _ = placer("prefix", *small, known("large", "x:1", Role.DECODE))
    assert place.place(generation(1600), [], frozenset()).placement.decode.worker_id == "large"
