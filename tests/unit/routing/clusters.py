"""Cluster states and requests for tests of placement: one small model's, and any at all."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import get_args

from hypothesis import strategies as st

from baton.config import PolicyName
from baton.kv.events import TierCounts
from baton.routing import ClusterView, Curve, Placement, Request, Role, Slo, WorkerView, create_policy

POLICIES = list(get_args(PolicyName))

# 16-token blocks, about 2000 prompt tokens/s, 10 ms decode steps: a small model on a few CPU cores.
PREFILL_CURVE = Curve(((16.0, 0.010), (256.0, 0.120), (1024.0, 0.520), (4096.0, 2.600)))
DECODE_CURVE = Curve(((1.0, 0.010), (8.0, 0.016), (32.0, 0.040)))


def worker(worker_id: str, role: Role, **changes: object) -> WorkerView:
    view = WorkerView(
        worker_id=worker_id,
        incarnation="1",
        address=f"{worker_id}:1",
        role=role,
        total_blocks=2048,
        free_blocks=2048,
        prefill_curve=PREFILL_CURVE,
        decode_curve=DECODE_CURVE,
        read_bytes_per_s=dict.fromkeys(("p0", "p1", "d0", "d1"), 2e9),
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def prefiller(name: str = "p0", **changes: object) -> WorkerView:
    return worker(name, Role.PREFILL, **changes)


def decoder(name: str = "d0", **changes: object) -> WorkerView:
    return worker(name, Role.DECODE, **changes)


def prompt(tokens: int, output: int = 128, **changes: object) -> Request:
    request = Request(
        prompt_tokens=tokens, blocks=-(-(tokens + output) // 16), block_size=16, block_bytes=65536
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def place(request: Request, *workers: WorkerView, policy: str = "prefix", seed: int = 0) -> Placement:
    return create_policy(policy, Random(seed)).place(request, ClusterView(workers))


def unknown(view: WorkerView) -> WorkerView:
    return replace(view, prefill_curve=Curve(), decode_curve=Curve(), read_bytes_per_s={})


@st.composite
def clusters(draw: st.DrawFn) -> ClusterView:
    workers = []
    for index in range(draw(st.integers(0, 6))):
        total = draw(st.one_of(st.integers(1, 300), st.integers(6000, 9000)))
        view = worker(
            f"w{index}",
            draw(st.sampled_from(Role)),
            total_blocks=total,
            free_blocks=draw(st.integers(0, total)),
            cached_blocks=draw(st.integers(0, total)),
            running=draw(st.integers(0, 64)),
            waiting=draw(st.integers(0, 64)),
            queued_tokens=draw(st.integers(0, 100_000)),
            draining=draw(st.booleans()),
            read_bytes_per_s={
                f"w{i}": draw(st.sampled_from([1e6, 1e10])) for i in range(draw(st.integers(0, 6)))
            },
        )
        speeds = st.sampled_from([0.0, 1e6, 1e10])
        view = replace(view, host_bytes_per_s=draw(speeds), disk_bytes_per_s=draw(speeds))
        workers.append(unknown(view) if draw(st.booleans()) else view)
    return ClusterView(workers)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    tokens = draw(st.integers(1, 5000))
    block_size = draw(st.sampled_from([1, 16, 256]))
    full = tokens // block_size
    names = st.sampled_from([f"w{i}" for i in range(8)])
    held = draw(st.dictionaries(names, st.integers(0, full)))
    tiers = {
        name: _split(blocks, draw(st.integers(0, blocks)), draw(st.integers(0, blocks)))
        for name, blocks in held.items()
    }
    return Request(
        prompt_tokens=tokens,
        blocks=-(-tokens // block_size) + draw(st.integers(0, 100)),
        block_size=block_size,
        block_bytes=draw(st.integers(1, 1 << 20)),
        held=held,
        tiers=draw(st.sampled_from([tiers, {}])),
        avoid=draw(st.frozensets(names, max_size=2)),
        slo=draw(st.sampled_from(get_args(Slo))),
        session=draw(st.sampled_from(["", "a"])),
        session_worker=draw(st.none() | names),
    )


def _split(blocks: int, first: int, second: int) -> TierCounts:
    low, high = sorted((first, second))
    return TierCounts(low, high - low, blocks - high)
