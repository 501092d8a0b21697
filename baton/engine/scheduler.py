"""Which sequences run in the next engine step, and with how many tokens each."""

from __future__ import annotations

import math
import sys
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from functools import partial

from baton.engine.sequence import Sequence, State, Work, longest_reusable
from baton.errors import Overloaded, PoolTooSmall
from baton.kv.lower import Held
from baton.kv.pool import BlockPool, NoFreeBlocks
from baton.routing.pacing import UNBOUNDED, Pace


@dataclass(frozen=True)
class Limits:
    """What one step and the queue may hold."""

    max_batch_tokens: int
    max_batch_requests: int
    max_waiting: int


@dataclass(frozen=True)
class Scheduled:
    """`query_len` tokens of `sequence`, from position `start` on, go into the step; `samples` says that it
    ends with a new token for this sequence."""

    sequence: Sequence
    query_len: int
    start: int
    samples: bool

    @classmethod
    def next_of(cls, sequence: Sequence, query_len: int) -> Scheduled:
        """The next `query_len` tokens of `sequence` that no step has yet."""
        start = sequence.computed + sequence.ahead
        return cls(sequence, query_len, start, samples=query_len == sequence.remaining)


@dataclass(frozen=True)
class Load:
    """Blocks to bring up from lower tiers into `blocks`, for whom `loaded` is then called with how many of
    them, from the first, are good."""

    held: Sequence_[Held]
    blocks: Sequence_[int]
    loaded: Callable[[int], None]


class Scheduler:
    """Continuous batching with chunked prefill over one block pool. Pure state, no clock, no tensors.

    Each step first gives every decoding sequence its token, then fills what is left of the token
    budget with prompt chunks, oldest first. A sequence gets blocks for its whole context when it is
    admitted, so a prompt once started always finishes; when a decoding sequence needs a block and
    none is left, the youngest running sequence gives up its blocks and is recomputed later.
    While `admits` is false nothing new is admitted: whoever set it needs the blocks first. Frozen sequences
    sit steps out.

    `pace` bounds the prompt tokens in a step in which sequences decode, and how many decode together:
    a sequence that would be one too many begins when another has ended.

    The next step may be scheduled while steps before it run. Then nothing is preempted, a sequence whose
    last token a running step samples for certain is left out, and blocks of a sequence that is taken out
    stay its own until the steps it is in have ended.
    """

    def __init__(self, pool: BlockPool, limits: Limits, pace: Pace = UNBOUNDED) -> None:
        self.pool = pool
        self.limits = limits
        self.pace = pace
        self._most_decoding = pace.decoding(limits.max_batch_requests)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.loading: set[Sequence] = set()
        self._loads: list[Load] = []
        self.holding: set[Sequence] = set()
        self.ending: set[Sequence] = set()
        self.preemptions = 0
        self.admits = True
        self.max_model_len = sys.maxsize
        self._in_flight = 0
        self._first_deadline_s = math.inf

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens promised and not yet computed."""
        waiting = sum(len(sequence.tokens) for sequence in self.waiting)
        loading = sum(sequence.remaining for sequence in self.loading)
        prompts = (len(s.tokens) - s.computed for s in self.running)
        return waiting + loading + sum(tokens for tokens in prompts if tokens > 1)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            PoolTooSmall: it can never fit.
            Overloaded: the queue is full.
        """
        self.require_fit(sequence)
        if len(self.waiting) >= self.limits.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting (--max-waiting)", retry_after_s=1.0)
        self._heed(sequence)
        self.waiting.append(sequence)

    def require_fit(self, sequence: Sequence) -> None:
        """Raises PoolTooSmall when the sequence can need more blocks than there are."""
        tokens = len(sequence.tokens)
        if sequence.work is Work.GENERATE:
            tokens = sequence.prompt_len + sequence.sampling.max_tokens
        needed = sequence.blocks_for(tokens)
        if needed > self.pool.total_blocks:
            raise PoolTooSmall(
                f"the request needs {needed} KV blocks of {sequence.block_size} tokens and the worker has "
                f"{self.pool.total_blocks} in all; shorten it or raise --kv-blocks"
            )

    def adopt(self, sequence: Sequence, blocks: list[int], held: int) -> None:
        """Run a sequence whose context KV, but for its last token, is already in `blocks`.

        The first `held` blocks are shared ones the caller has referenced; the rest are private.
        """
        sequence.blocks, sequence.shared, sequence.copied = blocks, held, True
        sequence.computed = len(sequence.tokens) - 1
        sequence.state = State.RUNNING
        self._share_full_blocks(sequence)
        self._heed(sequence)
        self.running.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step; empty when there is nothing to compute, or not before a running step ends.

        Every scheduled sequence owns the blocks its tokens go to and is in flight until `advance` or
        `abandon`.
        """
        batch: list[Scheduled] = []
        budget = self.limits.max_batch_tokens
        self._let_decode()
        for sequence in list(self.running):
            if budget == 0 or sequence.state is not State.RUNNING or sequence.frozen:
                continue
            if self._waits_to_decode(sequence):
                continue
            if sequence.remaining == 1 and not self._last_is_pending(sequence):
                if self._grow(sequence, batch):
                    batch.append(Scheduled.next_of(sequence, 1))
                    budget -= 1
                elif self._in_flight:
                    return []
        budget = self.pace.prompt_tokens(len(batch), budget)
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0 and not sequence.frozen:
                take = min(sequence.remaining, budget)
                batch.append(Scheduled.next_of(sequence, take))
                budget -= take
        while self.admits and budget > 0 and self.waiting and self._has_place(self.waiting[0]):
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            if sequence.state is State.LOADING:
                continue
            take = min(sequence.remaining, budget)
            batch.append(Scheduled.next_of(sequence, take))
            budget -= take
        for scheduled in batch:
            sequence = scheduled.sequence
            sequence.in_flight += 1
            sequence.ahead += scheduled.query_len
            sequence.pending += scheduled.samples
        self._in_flight += len(batch)
        return batch

    def learn(self, batch: list[Scheduled], took_s: float) -> None:
        """Keep to the pace by what a step of it took."""
        decoding = sum(item.query_len == 1 for item in batch)
        self.learn_steps(decoding, sum(item.query_len for item in batch) - decoding, took_s)

    def learn_steps(self, decoding: int, prompt_tokens: int, took_s: float, steps: int = 1) -> None:
        """As `learn`, of steps of so many decoding sequences and prompt tokens that took `took_s` each."""
        if self.pace.itl_target_s:
            self.pace = self.pace.learnt(decoding, prompt_tokens, took_s, steps)
            self._most_decoding = self.pace.decoding(self.limits.max_batch_requests)

    def advance(self, scheduled: Scheduled) -> None:
        """Record that a scheduled sequence's tokens were computed, in the order of the steps. Call before
        appending its new token."""
        self.abandon(scheduled)
        if scheduled.sequence.state is State.RUNNING:
            self.compute(scheduled.sequence, scheduled.query_len)

    def compute(self, sequence: Sequence, tokens: int) -> None:
        """Record that the KV of the sequence's next `tokens` tokens is in its blocks."""
        sequence.computed += tokens
        self._share_full_blocks(sequence)

    def abandon(self, scheduled: Scheduled) -> None:
        """Record that a step ended, for one of its sequences, with nothing to show for it."""
        sequence = scheduled.sequence
        sequence.in_flight -= 1
        sequence.ahead -= scheduled.query_len
        sequence.pending -= scheduled.samples
        self._in_flight -= 1
        self._free_duplicates(sequence)
        if sequence.state is State.ENDING and not sequence.in_flight:
            self.ending.remove(sequence)
            self._finish(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Keep the blocks of finished prefill work until `release`."""
        self.running.remove(sequence)
        sequence.state = State.HOLDING
        self.holding.add(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Run a sequence again that was held."""
        self.holding.remove(sequence)
        sequence.state = State.RUNNING
        self._heed(sequence)
        self.running.append(sequence)

    def expired(self, now_s: float) -> list[Sequence]:
        """Sequences whose deadline has passed before they ended; the caller ends them."""
        if now_s < self._first_deadline_s:
            return []
        late, others = [], [math.inf]
        for sequence in (*self.running, *self.waiting):
            if sequence.deadline_s <= now_s and not sequence.frozen:
                late.append(sequence)
            else:
                others.append(sequence.deadline_s)
        self._first_deadline_s = min(others)
        return late

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out and free its blocks, now or when the steps it is in have ended; nothing may be
        loaded into them."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.HOLDING:
            self.holding.remove(sequence)
        elif sequence.state is State.LOADING:
            self.loading.remove(sequence)
        if sequence.in_flight:
            self.ending.add(sequence)
            sequence.state = State.ENDING
        else:
            self._finish(sequence)

    def _heed(self, sequence: Sequence) -> None:
        self._first_deadline_s = min(self._first_deadline_s, sequence.deadline_s)

    def _let_decode(self) -> None:
        """Let the oldest sequences decode, as many as may together; who has begun goes on."""
        room = self._most_decoding - sum(not each.held_back for each in self.running)
        for sequence in self.running:
            if room > 0 and self._waits_to_decode(sequence):
                sequence.held_back = False
                room -= 1

    def _waits_to_decode(self, sequence: Sequence) -> bool:
        return sequence.held_back and sequence.output_len > 0

    def _has_place(self, sequence: Sequence) -> bool:
        most = self.limits.max_batch_requests
        if sequence.work is Work.GENERATE:
            most = self._most_decoding
        return len(self.running) + len(self.loading) < most

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence what the cache holds of it and private blocks for the rest."""
        reusable = below = 0
        if not sequence.wants_prompt_logprobs:
            chain = sequence.chain(longest_reusable(sequence.tokens, sequence.block_size))
            reusable = self.pool.match(chain)
            below = self.pool.match_below(chain, reusable)
        blocks = self.pool.acquire(sequence.chain(reusable))
        # Making room for what comes up must not push it out.
        held = self.pool.hold_below(sequence.chain(reusable + below)[reusable:])
        try:
            blocks += self.pool.allocate(sequence.blocks_for(len(sequence.tokens)) - reusable)
        except NoFreeBlocks:
            self.pool.let_go(held)
            self.pool.release(blocks)
            return False
        sequence.blocks, sequence.shared = blocks, reusable
        sequence.computed = reusable * sequence.block_size
        if held:
            sequence.state = State.LOADING
            self.loading.add(sequence)
            loading = blocks[reusable : reusable + below]
            self._loads.append(Load(held, loading, partial(self._loaded, sequence, held)))
        else:
            self._begin(sequence)
        return True

    def take_loads(self) -> list[Load]:
        """Loads that `schedule` asked for since the last call; the caller carries them out."""
        loads, self._loads = self._loads, []
        return loads

    def _loaded(self, sequence: Sequence, held: Sequence_[Held], good: int) -> None:
        """The first `good` of the blocks being brought up hold their KV; the rest is computed."""
        sequence.computed += good * sequence.block_size
        sequence.tier_blocks = Counter(each.tier for each in held[:good])
        self._share_full_blocks(sequence)
        if sequence.cancelled:
            self.release(sequence)
            return
        self.loading.remove(sequence)
        self._begin(sequence)

    def _begin(self, sequence: Sequence) -> None:
        """Run a sequence; what it has now is what the cache gave it."""
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_len)
            used = range(sequence.pulled.start, min(sequence.pulled.stop, sequence.shared))
            sequence.pulled_tokens = len(used) * sequence.block_size
        sequence.state = State.RUNNING
        self._heed(sequence)
        self.running.append(sequence)

    def _grow(self, sequence: Sequence, batch: list[Scheduled]) -> bool:
        """Give a decoding sequence the block of its next token; False if there is none for it, or it was
        itself preempted."""
        while len(sequence.blocks) < sequence.blocks_for(len(sequence.tokens) + sequence.pending):
            try:
                sequence.blocks += self.pool.allocate(1)
            except NoFreeBlocks:
                victim = None if self._in_flight else self._youngest(batch)
                if victim is None:
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False
        return True

    def _last_is_pending(self, sequence: Sequence) -> bool:
        """Whether a running step samples the sequence's last token, whichever that is."""
        if not sequence.pending:
            return False
        return (
            sequence.work is Work.PREFILL
            or sequence.output_len + sequence.pending >= sequence.sampling.max_tokens
            or len(sequence.tokens) + sequence.pending >= self.max_model_len
        )

    def _youngest(self, batch: list[Scheduled]) -> Sequence | None:
        """The running sequence to preempt: the last admitted that is not in this step and not a
        handoff's, whose blocks others may be reading."""
        chosen = {scheduled.sequence for scheduled in batch}
        for sequence in reversed(self.running):
            if sequence not in chosen and sequence.work is Work.GENERATE:
                return sequence
        return None

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_blocks(sequence)
        sequence.prompt_logprobs.clear()
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _finish(self, sequence: Sequence) -> None:
        self._free_blocks(sequence)
        sequence.state = State.FINISHED

    def _free_blocks(self, sequence: Sequence) -> None:
        if sequence.copied:
            self.pool.release_copies(sequence.blocks)
        else:
            self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.shared, sequence.copied = [], 0, 0, False

    def _free_duplicates(self, sequence: Sequence) -> None:
        """What replaced them was in place before any step that still runs was scheduled."""
        if sequence.duplicates:
            self.pool.release(sequence.duplicates)
            sequence.duplicates = []

    def _share_full_blocks(self, sequence: Sequence) -> None:
        full = sequence.computed // sequence.block_size
        if full == sequence.shared:
            return
        chain = sequence.chain(full)
        for index in range(sequence.shared, full):
            block, block_id = sequence.blocks[index], chain[index]
            if sequence.in_flight and self.pool.match(chain[: index + 1]) > index:
                sequence.blocks[index : index + 1] = self.pool.acquire([block_id])
                sequence.duplicates.append(block)  # a running step reads it
            else:
                sequence.blocks[index] = self.pool.share(block, block_id, chain[index - 1] if index else None)
        sequence.shared = full
