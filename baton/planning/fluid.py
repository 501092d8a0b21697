"""What a fleet will do to a workload, in milliseconds of computing: the two stages as queues.

Prefill is one queue, first come first served, in front of all prefill workers: each takes as many whole
prompts as its step may hold. KV goes from one network card to another, a prompt at a time, while it is
computed. Decode is processor sharing: all requests of a worker advance by one token per step, and a step
takes the longer the more there are. All of it follows the arrivals as they were recorded, so a burst counts
as one. What is left out (placement, chunks, eviction, messages) is what the simulator is for.
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
from baton.sim.speed import Chunk, Speed
from baton.sim.workload import SimRequest


class Prefilled(NamedTuple):
    """A prompt that worker number `worker` computed from `begin_s` to `at_s`."""

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


def prefill(offer: Offer, count: int, requests: Sequence[SimRequest], router_s: float) -> list[Prefilled]:
    """When `count` workers would have computed each prompt, in the order in which that happens."""
    done: list[Prefilled] = []
    free = [(0.0, worker) for worker in range(count)]
    first, total = 0, len(requests)
    while first < total:
        free_s, worker = heapq.heappop(free)
        begin_s = max(free_s, requests[first].arrival_s + router_s)
        end, tokens = first, 0
        chunks: list[Chunk] = []
        while end < total and requests[end].arrival_s + router_s <= begin_s:
            length = requests[end].prompt_tokens
            if chunks and tokens + length > offer.spec.max_batch_tokens:
                break
            chunks.append(Chunk(0, length))
            tokens += length
            end += 1
        done_s = begin_s + offer.spec.speed.prefill_s(chunks)
        done += [Prefilled(request, worker, begin_s, done_s) for request in requests[first:end]]
        heapq.heappush(free, (done_s, worker))
        first = end
    done.sort(key=lambda prompt: prompt.at_s)
    return done


def decode(
    fleet: Fleet, prompts: Sequence[Prefilled], block_tokens: int, kv_bytes_per_token: int
) -> list[float]:
    """Seconds per token after the first of each of `prompts`, 0 where there is none."""
    tpots = [0.0] * len(prompts)
    workers = [_Decoder(fleet.decode, block_tokens, tpots) for _ in range(fleet.decoders)]
    sent_s = [0.0] * fleet.prefills
    bytes_per_s = min(fleet.prefill.spec.network_bytes_per_s, fleet.decode.spec.network_bytes_per_s)
    for number, prompt in enumerate(prompts):
        request = prompt.request
        if request.output_tokens < 2:
            continue
        for worker in workers:
            worker.advance(prompt.at_s)
        chosen = min(workers, key=lambda worker: (max(worker.received_s, prompt.begin_s), worker.occupied))
        seconds = request.prompt_tokens * kv_bytes_per_token / bytes_per_s
        there_s = max(prompt.begin_s, sent_s[prompt.worker], chosen.received_s) + seconds
        sent_s[prompt.worker] = chosen.received_s = there_s
        chosen.join(number, prompt, max(prompt.at_s, there_s))
    for worker in workers:
        worker.advance(inf)
    return tpots


def attained(prompts: Sequence[Prefilled], tpots: Sequence[float], targets: Targets) -> Prediction:
    """The shares of `prompts` that met their targets, with the seconds per token of each."""
    longest_s = inf if targets.ttft_s is None else targets.ttft_s
    slowest_s = inf if targets.tpot_s is None else targets.tpot_s
    quick = [prompt.ttft_s <= longest_s for prompt in prompts]
    steady = [tpot_s <= slowest_s for tpot_s in tpots]
    both = sum(map(bool.__and__, quick, steady))
    return Prediction(sum(quick) / len(prompts), sum(steady) / len(prompts), both / len(prompts))


@dataclass(order=True)
class _Running:
    """A request that decodes from `from_s` on until the worker has done `end` steps."""

    end: float
    number: int
    from_s: float = field(compare=False)
    prompt: Prefilled = field(compare=False)
    blocks: int = field(compare=False)


class _Decoder:
    """One decode worker. Its steps are counted in fractions, so that it can be looked at at any time."""

    def __init__(self, offer: Offer, block_tokens: int, tpots: list[float]) -> None:
        self._speed: Speed = offer.spec.speed
        self._limit = offer.spec.max_batch_requests
        self._room = offer.spec.kv_blocks
        self._block_tokens = block_tokens
        self._tpots = tpots
        self._now_s = 0.0
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

    def advance(self, to_s: float) -> None:
        """Decode until `to_s`, or until nothing is left."""
        while self._waiting and (due_s := self._waiting[0].from_s) > self._now_s and due_s <= to_s:
            self._decode(due_s)
            self._now_s = due_s
            self._admit()
        self._decode(to_s)
        self._now_s = max(self._now_s, to_s)

    def _decode(self, to_s: float) -> None:
        while self._running:
            batch = len(self._running)
            fixed_s, per_token_s = self._speed.decode_line(batch)
            first_s, growth_s = fixed_s + per_token_s * self._context, per_token_s * batch
            left = self._running[0].end - self._steps
            spent_s = left * first_s + growth_s * left * left / 2
            if self._now_s + spent_s > to_s:
                if self._now_s < to_s:
                    self._move(_steps_in(to_s - self._now_s, first_s, growth_s), to_s)
                return
            self._move(left, self._now_s + spent_s)
            self._end(heapq.heappop(self._running))
            self._admit()

    def _move(self, steps: float, to_s: float) -> None:
        self._steps += steps
        self._context += steps * len(self._running)
        self._now_s = to_s

    def _end(self, ended: _Running) -> None:
        request = ended.prompt.request
        self._tpots[ended.number] = (self._now_s - ended.prompt.at_s) / (request.output_tokens - 1)
        self._context -= request.prompt_tokens + request.output_tokens - 1
        self._room += ended.blocks

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            head = self._waiting[0]
            if head.from_s > self._now_s or (head.blocks > self._room and self._running):
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
