"""A recorded workload replayed through a placement policy in virtual time: what is hit, who is busy.

Policies, pools and the prefix index are the real ones. A worker computes one prompt at a time, first come
first served, for as long as its curve says; decoding takes as long as the step time at the batch it joins.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random

from baton.kv.events import WorkerEvents
from baton.kv.index import PrefixIndex
from baton.kv.pool import BlockPool
from baton.routing import ClusterView, Curve, Placement, Request, Role, WorkerView, create_policy
from baton.routing.cost import HANDOFF_S, compute_s
from baton.routing.expected import Coming, Expected
from baton.sim.trace import BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True)
class SimCluster:
    """The cluster to replay on: every worker alike. A report or a request is `network_s` under way, a
    router's reservations `share_s` until the other routers have them.
    """

    roles: tuple[Role, ...]
    blocks_per_worker: int
    prefill_curve: Curve
    decode_curve: Curve
    block_bytes: int
    read_bytes_per_s: float
    routers: int = 1
    network_s: float = 0.005
    share_s: float = 0.010


@dataclass
class WorkerTotals:
    """What one worker did: seconds of computing prompts, and seconds of steps shared out to requests."""

    role: Role
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def busy_s(self) -> float:
        return self.prefill_s + self.decode_s


@dataclass
class Replayed:
    """What came of a replay; tokens are prompt tokens."""

    prompt_tokens: int = 0
    hit_tokens: int = 0
    pulled_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    workers: dict[str, WorkerTotals] = field(default_factory=dict)
    span_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that nobody had to compute."""
        return self.hit_tokens / max(1, self.prompt_tokens)

    @property
    def imbalance(self) -> float:
        """The busiest worker's load over the mean of its role's; the worst role's counts."""
        worst = 1.0
        for role in Role:
            busy = [totals.busy_s for totals in self.workers.values() if totals.role is role]
            if busy and sum(busy):
                worst = max(worst, max(busy) * len(busy) / sum(busy))
        return worst

    @property
    def utilization(self) -> float:
        """The mean share of time that workers that prefill spend on it."""
        busy = [totals.prefill_s for totals in self.workers.values() if totals.prefill_s]
        return sum(busy) / max(1, len(busy)) / max(1e-9, self.span_s)


@dataclass(eq=False)
class _Job:
    trace: TraceRequest
    request: Request
    placement: Placement
    router: int
    coming: Coming


@dataclass(eq=False, slots=True)
class _Promise:
    made_s: float
    router: int
    requests: int
    queued_tokens: int
    blocks: int


@dataclass(frozen=True, slots=True)
class _Progress:
    """The prompt that is being computed: workers report what is left of it at every step."""

    tokens: int
    began_s: float
    seconds: float

    def tokens_left(self, at_s: float) -> int:
        if not self.tokens:
            return 0
        return round(self.tokens * max(0.0, 1 - max(0.0, at_s - self.began_s) / self.seconds))


def replay(requests: Sequence[TraceRequest], policy: str, cluster: SimCluster, seed: int = 0) -> Replayed:
    """Run all `requests`, in order of arrival, to their end."""
    return _Simulation(policy, cluster, seed).run(requests)


class _Simulation:
    def __init__(self, policy: str, cluster: SimCluster, seed: int) -> None:
        self.cluster = cluster
        self.now_s = 0.0
        self.result = Replayed()
        self.index = PrefixIndex()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._policies = [create_policy(policy, Random(seed + n)) for n in range(cluster.routers)]
        self._sessions: dict[str, str] = {}
        self._expected = [Expected() for _ in range(cluster.routers)]
        self._promises: dict[str, deque[_Promise]] = {}
        self.workers: dict[str, _Worker] = {}
        names = [f"{role.value}{number}" for number, role in enumerate(cluster.roles)]
        self.bandwidths = dict.fromkeys(names, cluster.read_bytes_per_s)
        for name, role in zip(names, cluster.roles, strict=True):
            worker = _Worker(name, role, self)
            self.workers[worker.worker_id] = worker
            self._promises[worker.worker_id] = deque()
            self.result.workers[worker.worker_id] = worker.totals

    def run(self, requests: Sequence[TraceRequest]) -> Replayed:
        for number, trace in enumerate(requests):
            self.at(trace.arrival_s, self._arrival(trace, number % self.cluster.routers))
        while self._events:
            self.now_s, _, happen = heapq.heappop(self._events)
            happen()
        self.result.span_s = self.now_s
        return self.result

    def at(self, time_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), happen))

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        self.at(self.now_s + seconds, happen)

    def _arrival(self, trace: TraceRequest, router: int) -> Callable[[], None]:
        def place() -> None:
            request = Request(
                prompt_tokens=trace.prompt_tokens,
                blocks=-(-(trace.prompt_tokens + trace.output_tokens) // BLOCK_TOKENS),
                block_size=BLOCK_TOKENS,
                block_bytes=self.cluster.block_bytes,
                held=self.index.lookup(trace.chain),
                expected=self._expected[router].lookup(trace.chain),
                session=trace.session,
                session_worker=self._sessions.get(trace.session),
            )
            views = [self._seen(worker, router) for worker in self.workers.values()]
            placement = self._policies[router].place(request, ClusterView(views))
            self._promise(placement, request, router)
            self._sessions[trace.session] = placement.decode.worker_id
            computing = placement.computing.worker_id
            coming = self._expected[router].add(computing, trace.chain)
            self.workers[computing].expect(_Job(trace, request, placement, router, coming))

        return place

    def computed(self, job: _Job) -> None:
        """A prompt is computed, which its router hears a little later."""
        self.after(self.cluster.network_s, lambda: self._expected[job.router].remove(job.coming))

    def _promise(self, placement: Placement, request: Request, router: int) -> None:
        decode, computing = placement.decode.worker_id, placement.computing.worker_id
        for worker_id in {decode, computing}:
            self._promises[worker_id].append(
                _Promise(
                    self.now_s,
                    router,
                    1 if worker_id == decode else 0,
                    placement.compute_tokens if worker_id == computing else 0,
                    max(0, request.prompt_blocks - request.held.get(worker_id, 0)),
                )
            )

    def _seen(self, worker: _Worker, router: int) -> WorkerView:
        """What a router knows of a worker: its last report to arrive, and promises not yet in that."""
        view = worker.reported
        promises = self._promises[worker.worker_id]
        while promises and promises[0].made_s <= worker.reported_s - self.cluster.network_s:
            promises.popleft()
        left = worker.reported_progress.tokens_left(self.now_s - self.cluster.network_s)
        requests = queued_tokens = blocks = 0
        for promise in promises:
            if promise.router == router or promise.made_s <= self.now_s - self.cluster.share_s:
                requests += promise.requests
                queued_tokens += promise.queued_tokens
                blocks += promise.blocks
        return WorkerView(
            worker_id=view.worker_id,
            incarnation=view.incarnation,
            address=view.address,
            role=view.role,
            total_blocks=view.total_blocks,
            free_blocks=max(0, view.free_blocks - blocks),
            cached_blocks=view.cached_blocks,
            running=view.running,
            waiting=view.waiting + requests,
            queued_tokens=view.queued_tokens + left + queued_tokens,
            prefill_curve=view.prefill_curve,
            decode_curve=view.decode_curve,
            read_bytes_per_s=view.read_bytes_per_s,
        )


class _Worker:
    """One worker: a pool, a queue of prompts, a batch that decodes."""

    def __init__(self, worker_id: str, role: Role, simulation: _Simulation) -> None:
        self.worker_id = worker_id
        self.totals = WorkerTotals(role)
        self._sim = simulation
        self._cluster = simulation.cluster
        self._pool = BlockPool(self._cluster.blocks_per_worker)
        self._sequence = 0
        self._publish()
        self._queue: deque[_Job] = deque()
        self._computing: _Job | None = None
        self._arriving: deque[tuple[_Job, Callable[[], None]]] = deque()
        self._decoding = 0
        self._progress = _Progress(0, 0.0, 0.0)
        self.reported = self._view()
        self.reported_progress = self._progress
        self.reported_s = 0.0

    def expect(self, job: _Job) -> None:
        """A router sent `job` here to have its prompt computed."""

        def arrive() -> None:
            self._queue.append(job)
            self._advance()
            self._report()

        self._sim.after(self._cluster.network_s, arrive)

    def _advance(self) -> None:
        """Begin the next prompt if none is being computed and there are blocks for it."""
        if self._computing is not None or not self._queue:
            return
        job = self._queue[0]
        trace = job.trace
        held = self._pool.match(trace.chain)
        outputs = -(-(trace.prompt_tokens + trace.output_tokens) // BLOCK_TOKENS) - len(trace.chain)
        own = job.placement.prefill is None
        if not self._admits(trace.chain, outputs if own else 1):
            return
        self._queue.popleft()
        self._computing = job
        pulled = self._pullable(job, held)
        blocks = self._take(trace.chain, held, outputs if own else 1)
        cached = job.request.tokens_in(held + pulled)
        seconds = compute_s(self.reported, trace.prompt_tokens, cached)
        if pulled:
            self._sim.result.pulled_tokens += cached - job.request.tokens_in(held)
            seconds += HANDOFF_S + pulled * self._cluster.block_bytes / self._cluster.read_bytes_per_s
        self._sim.result.prompt_tokens += trace.prompt_tokens
        self._sim.result.hit_tokens += cached
        self.totals.prefill_s += seconds

        self._progress = _Progress(trace.prompt_tokens - cached, self._sim.now_s, seconds)

        def computed() -> None:
            self._computing = None
            self._progress = _Progress(0, 0.0, 0.0)
            self._sim.result.first_token_s.append(self._sim.now_s - trace.arrival_s)
            self._share(trace.chain, held, blocks)
            self._sim.computed(job)
            if own:
                self._decode(job, blocks)
            else:
                self._sim.workers[job.placement.decode.worker_id].read(job, lambda: self._release(blocks))
            self._advance()
            self._report()

        self._sim.after(seconds, computed)

    def _pullable(self, job: _Job, held: int) -> int:
        """Blocks beyond `held` that the source of the job's pull still has; there they are copies now."""
        pull = job.placement.pull
        if pull is None:
            return 0
        source = self._sim.workers[pull.worker.worker_id]._pool
        there = min(source.match(job.trace.chain), pull.blocks)
        if there <= held:
            return 0
        source.release_copies(source.acquire(job.trace.chain[:there]))
        return there - held

    def read(self, job: _Job, done: Callable[[], None]) -> None:
        """Read what is lacking of a prompt that another worker has computed, then decode."""
        self._arriving.append((job, done))
        self._admit()

    def _admit(self) -> None:
        while self._arriving:
            job, done = self._arriving[0]
            chain = job.trace.chain
            held = self._pool.match(chain)
            total = -(-(job.trace.prompt_tokens + job.trace.output_tokens) // BLOCK_TOKENS)
            if not self._admits(chain, total - len(chain)):
                return
            self._arriving.popleft()
            blocks = self._take(chain, held, total - len(chain))
            lacking = job.request.prompt_blocks - held
            seconds = HANDOFF_S + lacking * self._cluster.block_bytes / self._cluster.read_bytes_per_s
            self._sim.after(seconds, self._arrived(job, held, blocks, done))

    def _arrived(
        self, job: _Job, held: int, blocks: list[int], done: Callable[[], None]
    ) -> Callable[[], None]:
        def arrived() -> None:
            done()
            self._share(job.trace.chain, held, blocks)
            self._decode(job, blocks)
            self._report()

        return arrived

    def _decode(self, job: _Job, blocks: list[int]) -> None:
        self._decoding += 1
        step_s = self._cluster.decode_curve.seconds(self._decoding)
        seconds = job.trace.output_tokens * step_s
        self.totals.decode_s += seconds / self._decoding

        def decoded() -> None:
            self._decoding -= 1
            if job.placement.prefill is None:
                self._pool.release(blocks)
            else:
                self._pool.release_copies(blocks)
            self._freed()

        self._sim.after(seconds, decoded)

    def _admits(self, chain: Sequence[bytes], private: int) -> bool:
        # Held blocks count: taking those that nobody references makes them unavailable too.
        return len(chain) + private <= self._pool.available

    def _take(self, chain: Sequence[bytes], held: int, private: int) -> list[int]:
        """Blocks for the chain, of which the first `held` are there, and `private` ones."""
        return self._pool.acquire(chain[:held]) + self._pool.allocate(len(chain) - held + private)

    def _share(self, chain: Sequence[bytes], held: int, blocks: list[int]) -> None:
        for at in range(held, len(chain)):
            blocks[at] = self._pool.share(blocks[at], chain[at], chain[at - 1] if at else None)
        self._publish()

    def _release(self, blocks: list[int]) -> None:
        self._pool.release(blocks)
        self._freed()

    def _freed(self) -> None:
        self._admit()
        self._advance()
        self._report()

    def _publish(self) -> None:
        events = tuple(self._pool.take_events())
        if events or not self._sequence:
            self._sequence += 1
            first = self._sequence == 1
            self._sim.index.apply(WorkerEvents(self.worker_id, "1", self._sequence, first, events))

    def _report(self) -> None:
        """Tell the routers, which know it a little later."""
        self._publish()
        sent_s, view, progress = self._sim.now_s, self._view(), self._progress

        def arrive() -> None:
            self.reported, self.reported_progress, self.reported_s = view, progress, sent_s

        self._sim.after(self._cluster.network_s, arrive)

    def _view(self) -> WorkerView:
        cluster = self._cluster
        return WorkerView(
            worker_id=self.worker_id,
            incarnation="1",
            address="",
            role=self.totals.role,
            total_blocks=cluster.blocks_per_worker,
            free_blocks=self._pool.available,
            cached_blocks=self._pool.cached,
            running=self._decoding,
            waiting=len(self._queue) + (self._computing is not None) + len(self._arriving),
            queued_tokens=sum(job.placement.compute_tokens for job in self._queue),
            prefill_curve=cluster.prefill_curve,
            decode_curve=cluster.decode_curve,
            read_bytes_per_s=self._sim.bandwidths,
        )
