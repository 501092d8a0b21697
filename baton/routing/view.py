"""What a placement policy sees: the request, the live workers, and what is predicted of each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal

from baton.errors import Unavailable
from baton.kv.events import TierCounts

Slo = Literal["interactive", "batch"]
"""How urgent a request is: somebody waits for the tokens, or nobody does."""

_UNMEASURED_READ_BYTES_PER_S = 1e9
_NOTHING = TierCounts()


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
    against the requests in it. `points` ascend in size; none means unknown and reads as 0 s. `scale`
    multiplies all seconds: what was learnt since they were measured.
    """

    points: tuple[tuple[float, float], ...] = ()
    scale: float = 1.0

    @classmethod
    def measured(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """The curve through measurements, in any order, whose noise must not make more work look faster:
        neighbours that fall with size, or stay the same, become one point between them."""
        rising: list[tuple[float, float, int]] = []
        for size, seconds in sorted(points):
            count = 1
            while rising and rising[-1][1] >= seconds:
                last_size, last_seconds, last_count = rising.pop()
                both = last_count + count
                size = (last_size * last_count + size * count) / both
                seconds = (last_seconds * last_count + seconds * count) / both
                count = both
            rising.append((size, seconds, count))
        return cls(tuple((size, seconds) for size, seconds, _ in rising))

    def seconds(self, size: float) -> float:
        """Predicted seconds at `size`, never negative."""
        points = self.points
        if not points or size <= 0:
            return 0.0
        if len(points) == 1:
            return self.scale * points[0][1] * size / points[0][0]
        at = bisect_left(self._sizes, size, 1, len(points) - 1)
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        seconds = y0 + (y1 - y0) * (size - x0) / (x1 - x0)
        return self.scale * seconds if seconds > 0 else 0.0

    @cached_property
    def _sizes(self) -> tuple[float, ...]:
        return tuple(size for size, _ in self.points)


@dataclass(frozen=True)
class WorkerView:
    """One live worker as the router knows it now, work it has just been promised included.

    `free_blocks` are free or evictable, `cached_blocks` are kept for later requests, those in use included.
    `waiting` counts requests whose prefill or decode has not begun, `queued_tokens` prompt tokens promised
    and not yet computed. `itl_target_s` is what its steps in which requests decode should take at most,
    0 without such a target; `step_factor` is what they take, as a multiple of the curves. `read_bytes_per_s`
    is the bandwidth of reads from other workers by their id, `host_bytes_per_s` and `disk_bytes_per_s` that
    of reads from the worker's own tiers; 0 without.
    """

    worker_id: str
    incarnation: str
    address: str
    role: Role
    total_blocks: int
    free_blocks: int
    cached_blocks: int = 0
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    draining: bool = False
    prefill_curve: Curve = field(default_factory=Curve)
    decode_curve: Curve = field(default_factory=Curve)
    itl_target_s: float = 0.0
    step_factor: float = 1.0
    read_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    host_bytes_per_s: float = 0.0
    disk_bytes_per_s: float = 0.0

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of prefill already promised: `waiting` prompts of the mean length."""
        prompts = max(1, self.waiting)
        return prompts * self.prefill_curve.seconds(self.queued_tokens / prompts)

    def bandwidth_from(self, worker_id: str) -> float:
        """Bytes per second of reads from another worker.

        Where none was measured yet, the slowest measured from others; without any, a 10 Gb/s network's.
        """
        return self.read_bytes_per_s.get(worker_id) or self._slowest_read

    @cached_property
    def _slowest_read(self) -> float:
        return min(self.read_bytes_per_s.values(), default=_UNMEASURED_READ_BYTES_PER_S)


@dataclass(frozen=True)
class Request:
    """What placement needs to know of a request.

    `blocks` is what prompt and output can need in all. `held` maps a worker id to the number of leading
    prompt blocks that worker holds in any tier, `tiers` says where they lie; a worker that is not in
    `tiers` has all of them on its device. `expected` maps a worker id to the number of leading blocks that it
    will hold once it has computed the prompts sent to it. `session` names the conversation and
    `session_worker` where its last request was decoded, when they are known.
    """

    prompt_tokens: int
    blocks: int
    block_size: int
    block_bytes: int
    held: Mapping[str, int] = field(default_factory=dict)
    tiers: Mapping[str, TierCounts] = field(default_factory=dict)
    expected: Mapping[str, int] = field(default_factory=dict)
    avoid: frozenset[str] = frozenset()
    slo: Slo = "interactive"
    session: str = ""
    session_worker: str | None = None

    @cached_property
    def prompt_blocks(self) -> int:
        """Blocks the prompt fills, the last one in part."""
        return -(-self.prompt_tokens // self.block_size)

    def held_by_tier(self, worker_id: str) -> TierCounts:
        """The leading prompt blocks that the worker holds, by tier."""
        counts = self.tiers.get(worker_id)
        if counts is not None:
            return counts
        blocks = self.held.get(worker_id, 0)
        return TierCounts(device=blocks) if blocks else _NOTHING

    def on_device(self, worker_id: str) -> int:
        """Leading prompt blocks that the worker has on its device when it begins the prompt."""
        return max(self.held_by_tier(worker_id).device, self.expected.get(worker_id, 0))

    def tokens_in(self, blocks: int) -> int:
        """Prompt tokens that need no computing with so many leading blocks at hand: not the last one."""
        return min(blocks * self.block_size, self.prompt_tokens - 1)

    def cached_tokens(self, worker_id: str) -> int:
        """Prompt tokens whose KV the worker holds."""
        return self.tokens_in(self.held.get(worker_id, 0))

    def uncached_tokens(self, worker: WorkerView) -> int:
        """Prompt tokens the worker would have to compute itself."""
        return self.prompt_tokens - self.cached_tokens(worker.worker_id)

    def missing_blocks(self, worker: WorkerView) -> int:
        """Blocks the worker lacks to begin decoding now: the prompt's not on its device, and one more."""
        wanted = min(self.prompt_blocks + 1, self.blocks) - self.held_by_tier(worker.worker_id).device
        return max(0, wanted - worker.free_blocks)


class Unplaceable(Unavailable):
    """No live worker can take the request; the message says what is missing."""


@dataclass(frozen=True)
class ClusterView:
    """The live workers, draining ones included (policies skip them)."""

    workers: Sequence[WorkerView]

    def usable(self, request: Request) -> list[WorkerView]:
        """Workers that take new work and are not to be avoided."""
        return [w for w in self.workers if not w.draining and w.worker_id not in request.avoid]

    def decoders(self, request: Request) -> list[WorkerView]:
        """Workers that take decode work and could ever hold the request.

        Raises:
            Unplaceable: there are none; says whether they are missing, draining or too small.
        """
        live = [w for w in self.usable(request) if w.role.decodes]
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
        return [w for w in self.usable(request) if w.role is Role.PREFILL]
