"""What a fleet will do to a workload, in milliseconds of computing: two kinds of queues.

A prompt is given to a worker when it comes, as routers do, by what it would take with each
(`baton.routing.candidates` in short): a prefill worker computes prompts one after the other, and a decode
worker that computes one does not decode meanwhile. KV goes from one network card to another, a prompt at a
time, while it is computed. Decode is processor sharing: all requests of a worker advance by one token per
step, and a step takes the longer the more there are. All of it follows the arrivals as they were recorded,
so a burst counts as one. What is left out (caches, chunks, eviction, messages) is what the simulator is
for.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import NamedTuple

from baton.bench.summary import Targets
from baton.planning.fleet import Fleet, Offer
from baton.routing.candidates import least_disturbance_s
from baton.routing.cost import HANDOFF_S
from baton.sim.cluster import SimCluster
from baton.sim.speed import Chunk, Speed
from baton.sim.workload import SimRequest

BY_ITSELF = -1
"""The number of the prefill worker of a prompt that had none: a decode worker computed it."""


class Prefilled(NamedTuple):
    """A prompt that prefill worker number `worker` computed from `begin_s` to `at_s`."""

    request: SimRequest
    worker: int
    begin_s: float
    at_s: float

    @property
    def ttft_s(self) -> float:
        return self.at_s - self.request.arrival_s


@dataclass(frozen=True)
class Prediction:
    """Shares of the requests: those that meet the target of the first token, those that meet the one of the
    tokens after it, and those that meet both."""

    ttft: float
    tpot: float
    attainment: float


def serve(
    fleet: Fleet, requests: Sequence[SimRequest], like: SimCluster
) -> tuple[list[Prefilled], list[float]]:
    """When each prompt would have been computed, in the order of `requests`, and the seconds per token after
    the first, 0 where there is none."""
    tpots = [0.0] * len(requests)
    prefillers = [_Prefiller(fleet.prefill, worker) for worker in range(fleet.prefills)]
    decoders = [_Decoder(fleet.decode, like.block_tokens, tpots) for _ in range(fleet.decoders)]
    bytes_per_s = min(fleet.prefill.spec.network_bytes_per_s, fleet.decode.spec.network_bytes_per_s)
    prompts: dict[int, Prefilled] = {}
    computed: list[tuple[float, int]] = []  # by prefill workers: when, and which

    def read_s(request: SimRequest) -> float:
        return request.prompt_tokens * like.kv_bytes_per_token / bytes_per_s

    def advance(to_s: float) -> None:
        for prefiller in prefillers:
            for number, prompt in prefiller.advance(to_s):
                prompts[number] = prompt
                heapq.heappush(computed, (prompt.at_s, number))
        while computed and computed[0][0] <= to_s:
            at_s, number = heapq.heappop(computed)
            for decoder in decoders:
                decoder.advance(at_s)
            prompt = prompts[number]
            if prompt.request.output_tokens > 1:
                chosen, sender = _receiver(decoders, prompt), prefillers[prompt.worker]
                there_s = max(prompt.begin_s, sender.sent_s, chosen.received_s) + read_s(prompt.request)
                sender.sent_s = chosen.received_s = there_s
                chosen.join(number, prompt, max(at_s, there_s))
        for decoder in decoders:
            decoder.advance(to_s)

    for number, request in enumerate(requests):
        now_s = request.arrival_s + like.router_s
        advance(now_s)
        here_s = fleet.decode.spec.speed.prefill_s([Chunk(0, request.prompt_tokens)])
        alone_s = fleet.prefill.spec.speed.prefill_s([Chunk(0, request.prompt_tokens)])
        weighed = [(_here_s(decoder, here_s, now_s), decoder) for decoder in decoders]
        least_s, nearest = min(weighed, key=lambda each: each[0])
        prefiller = min(prefillers, key=lambda each: each.backlog_s(now_s))
        if least_s >= prefiller.backlog_s(now_s) + alone_s + HANDOFF_S + read_s(request):
            prefiller.take(number, request, now_s)
            continue
        begin_s = nearest.now_s
        nearest.stall(here_s)
        prompts[number] = Prefilled(request, BY_ITSELF, begin_s, nearest.now_s)
        if request.output_tokens > 1:
            nearest.join(number, prompts[number], nearest.now_s)
    advance(inf)
    return [prompts[number] for number in range(len(requests))], tpots


def _here_s(decoder: _Decoder, compute_s: float, now_s: float) -> float:
    """What a prompt would cost on a decode worker, which others share."""
    disturbs_s = max(decoder.occupied[0] * compute_s, least_disturbance_s(compute_s))
    return max(0.0, decoder.now_s - now_s) + compute_s + disturbs_s


def _receiver(workers: Sequence[_Decoder], prompt: Prefilled) -> _Decoder:
    """The decode worker that can take the KV of a prompt first, and of those the emptiest."""
    return min(workers, key=lambda worker: (max(worker.received_s, prompt.begin_s), worker.occupied))


def attained(prompts: Sequence[Prefilled], tpots: Sequence[float], targets: Targets) -> Prediction:
    """The shares of `prompts` that met their targets, with the seconds per token of each."""
    longest_s = inf if targets.ttft_s is None else targets.ttft_s
    slowest_s = inf if targets.tpot_s is None else targets.tpot_s
    quick = [prompt.ttft_s <= longest_s for prompt in prompts]
    steady = [tpot_s <= slowest_s for tpot_s in tpots]
    both = sum(map(bool.__and__, quick, steady))
    return Prediction(sum(quick) / len(prompts), sum(steady) / len(prompts), both / len(prompts))


class _Prefiller:
    """A prefill worker: in each step as many of the prompts that wait as it may hold, in order."""

    def __init__(self, offer: Offer, worker: int) -> None:
        self.sent_s = 0.0
        """Until when its KV is under way."""
        self._spec = offer.spec
        self._worker = worker
        self._free_s = 0.0
        self._waiting: deque[tuple[float, int, SimRequest]] = deque()
        self._waiting_s = 0.0

    def backlog_s(self, now_s: float) -> float:
        """Seconds until a prompt that comes now is begun, if every one takes a step."""
        return max(0.0, self._free_s - now_s) + self._waiting_s

    def take(self, number: int, request: SimRequest, now_s: float) -> None:
        """Compute a prompt as soon as those before it are."""
        self._waiting.append((now_s, number, request))
        self._waiting_s += self._spec.speed.prefill_s([Chunk(0, request.prompt_tokens)])

    def advance(self, to_s: float) -> list[tuple[int, Prefilled]]:
        """Begin the steps that begin before then; what they compute, by number."""
        computed = []
        while self._waiting and (begin_s := max(self._free_s, self._waiting[0][0])) < to_s:
            step: list[tuple[int, SimRequest]] = []
            tokens = 0
            while self._waiting and self._waiting[0][0] <= begin_s:
                _, number, request = self._waiting[0]
                if step and tokens + request.prompt_tokens > self._spec.max_batch_tokens:
                    break
                self._waiting.popleft()
                self._waiting_s -= self._spec.speed.prefill_s([Chunk(0, request.prompt_tokens)])
                tokens += request.prompt_tokens
                step.append((number, request))
            chunks = [Chunk(0, request.prompt_tokens) for _, request in step]
            self._free_s = begin_s + self._spec.speed.prefill_s(chunks)
            computed += [
                (number, Prefilled(each, self._worker, begin_s, self._free_s)) for number, each in step
            ]
        return computed


@dataclass(order=True)
class _Running:
    """A request that decodes from `from_s` on until the worker has done `end` steps."""

    end: float
    number: int
    from_s: float = field(compare=False)
    prompt: Prefilled = field(compare=False)
    blocks: int = field(compare=False)


class _Decoder:
    """One decode worker, as it is at `now_s`. Its steps are counted in fractions, so that it can be looked at
    at any time."""

    def __init__(self, offer: Offer, block_tokens: int, tpots: list[float]) -> None:
        self._speed: Speed = offer.spec.speed
        self._limit = offer.spec.max_batch_requests
        self._room = offer.spec.kv_blocks
        self._block_tokens = block_tokens
        self._tpots = tpots
        self.now_s = 0.0
        self._steps = 0.0
        self._context = 0.0
        self._running: list[_Running] = []
        self._waiting: deque[_Running] = deque()
        self.received_s = 0.0

    @property
    def occupied(self) -> tuple[int, float]:
        """How full it is, to choose the emptiest."""
        return len(self._running) + len(self._waiting), self._context

    def join(self, number: int, prompt: Prefilled, from_s: float) -> None:
        """Decode `prompt` as soon as there is room, from `from_s` on at the earliest."""
        tokens = prompt.request.prompt_tokens + prompt.request.output_tokens
        blocks = -(-tokens // self._block_tokens)
        self._waiting.append(_Running(inf, number, from_s, prompt, blocks))
        self._admit()

    def stall(self, seconds: float) -> None:
        """Do something else for so long."""
        self.now_s += seconds
        self._admit()

    def advance(self, to_s: float) -> None:
        """Decode until `to_s`, or until nothing is left."""
        while self._waiting and (due_s := self._waiting[0].from_s) > self.now_s and due_s <= to_s:
            self._decode(due_s)
            self.now_s = due_s
            self._admit()
        self._decode(to_s)
        self.now_s = max(self.now_s, to_s)

    def _decode(self, to_s: float) -> None:
        while self._running:
            batch = len(self._running)
            fixed_s, per_token_s = self._speed.decode_line(batch)
            first_s, growth_s = fixed_s + per_token_s * self._context, per_token_s * batch
            left = self._running[0].end - self._steps
            spent_s = left * first_s + growth_s * left * left / 2
            if self.now_s + spent_s > to_s:
                if self.now_s < to_s:
                    self._move(_steps_in(to_s - self.now_s, first_s, growth_s), to_s)
                return
            self._move(left, self.now_s + spent_s)
            self._end(heapq.heappop(self._running))
            self._admit()

    def _move(self, steps: float, to_s: float) -> None:
        self._steps += steps
        self._context += steps * len(self._running)
        self.now_s = to_s

    def _end(self, ended: _Running) -> None:
        request = ended.prompt.request
        self._tpots[ended.number] = (self.now_s - ended.prompt.at_s) / (request.output_tokens - 1)
        self._context -= request.prompt_tokens + request.output_tokens - 1
        self._room += ended.blocks

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            head = self._waiting[0]
            if head.from_s > self.now_s or (head.blocks > self._room and self._running):
                return
            self._waiting.popleft()
            self._room -= head.blocks
            self._context += head.prompt.request.prompt_tokens
            head.end = self._steps + head.prompt.request.output_tokens - 1
            heapq.heappush(self._running, head)


def _steps_in(seconds: float, first_s: float, growth_s: float) -> float:
    """How many steps so many seconds are, when a step takes `growth_s` more than the one before."""
    if growth_s <= 0:
        return seconds / first_s
    return (sqrt(first_s * first_s + 2 * growth_s * seconds) - first_s) / growth_s
