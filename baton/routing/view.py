"""What a placement policy sees and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from baton.errors import Unavailable


class Role(Enum):
    """What new work a worker takes. A hybrid worker does both and prefills for itself."""

    PREFILL = "prefill"
    DECODE = "decode"
    HYBRID = "hybrid"

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL

    @property
    def prefills_for_others(self) -> bool:
        return self is not Role.DECODE


@dataclass(frozen=True)
class Curve:
    """Seconds against size, measured at a few sizes; linear between them and beyond the last.

    Prefill curves: seconds of one prompt against its tokens. Decode curves: seconds of one step
    against the requests in it. `points` ascend in size; none means unknown and reads as 0 s.
    """

    points: tuple[tuple[float, float], ...] = ()

    def seconds(self, size: float) -> float:
        """Predicted seconds at `size`, never negative."""
        points = self.points
        if not points or size <= 0:
            return 0.0
        if len(points) == 1:
            return points[0][1] * size / points[0][0]
        at = min(max(bisect_left(points, (size, 0.0)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        return max(0.0, y0 + (y1 - y0) * (size - x0) / (x1 - x0))


@dataclass(frozen=True)
class WorkerView:
    """One live worker as the router knows it now, work it has just been promised included."""

    worker_id: str
    incarnation: str
    address: str
    role: Role
    total_blocks: int
    free_blocks: int
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    draining: bool = False
    prefill_curve: Curve = field(default_factory=Curve)
    decode_curve: Curve = field(default_factory=Curve)
    read_bytes_per_s: float = 0.0

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of prefill already promised."""
        return self.prefill_curve.seconds(self.queued_tokens)


@dataclass(frozen=True)
class Request:
    """What placement needs to know of a request.

    `blocks` is what prompt and output can need in all; `held` maps a worker id to the number of
    leading prompt blocks that worker holds.
    """

    prompt_tokens: int
    blocks: int
    block_size: int
    block_bytes: int
    held: Mapping[str, int] = field(default_factory=dict)
    avoid: frozenset[str] = frozenset()

    @property
    def prompt_blocks(self) -> int:
        """Blocks the prompt fills, the last one in part."""
        return -(-self.prompt_tokens // self.block_size)

    def cached_tokens(self, worker_id: str) -> int:
        """Prompt tokens whose KV the worker need not compute; at least one token always is."""
        return min(self.held.get(worker_id, 0) * self.block_size, self.prompt_tokens - 1)

    def uncached_tokens(self, worker: WorkerView) -> int:
        """Prompt tokens the worker would have to compute itself."""
        return self.prompt_tokens - self.cached_tokens(worker.worker_id)

    def missing_blocks(self, worker: WorkerView) -> int:
        """Blocks the worker lacks to begin decoding now: the prompt's that it does not hold, and one more."""
        wanted = min(self.prompt_blocks + 1, self.blocks) - self.held.get(worker.worker_id, 0)
        return max(0, wanted - worker.free_blocks)


@dataclass(frozen=True)
class Placement:
    """Who decodes, and who prefills: `prefill` is None when the decode worker does it itself."""

    decode: WorkerView
    prefill: WorkerView | None
    predicted_s: float
    reason: str


class Unplaceable(Unavailable):
    """No live worker can take the request; the message says what is missing."""


@dataclass(frozen=True)
class ClusterView:
    """The live workers, draining ones included (policies skip them)."""

    workers: Sequence[WorkerView]

    def decoders(self, request: Request) -> list[WorkerView]:
        """Workers that take decode work and could ever hold the request.

        Raises:
            Unplaceable: there are none; says whether they are missing, draining or too small.
        """
        live = [
            w for w in self.workers if w.role.decodes and not w.draining and w.worker_id not in request.avoid
        ]
        if not live:
            raise Unplaceable("no decode worker is ready; see GET /ready and the registry")
        fitting = [w for w in live if w.total_blocks >= request.blocks]
        if not fitting:
            largest = max(w.total_blocks for w in live)
            raise Unplaceable(
                f"the request needs {request.blocks} KV blocks and the largest decode worker has {largest}; "
                "shorten it or raise --kv-blocks"
            )
        return fitting

    def prefillers(self, request: Request) -> list[WorkerView]:
        """Dedicated prefill workers that take new work; may be empty."""
        return [
            w
            for w in self.workers
            if w.role is Role.PREFILL and not w.draining and w.worker_id not in request.avoid
        ]


class Policy(ABC):
    """Chooses where a request runs. One file per policy; no sockets, clocks or tensors."""

    @abstractmethod
    def place(self, request: Request, cluster: ClusterView) -> Placement:
        """Choose the decode worker and, unless it should prefill itself, the prefill worker.

        Raises:
            Unplaceable: see `ClusterView.decoders`.
        """
