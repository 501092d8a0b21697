"""Which sequences run in the next engine step, and with how many tokens each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from functools import partial

from baton.engine.sequence import Sequence, State, Work, longest_reusable
from baton.errors import Overloaded, PoolTooSmall
from baton.kv.lower import Held
from baton.kv.pool import BlockPool, NoFreeBlocks


@dataclass(frozen=True)
class Limits:
    """What one step and the queue may hold."""

    max_batch_tokens: int
    max_batch_requests: int
    max_waiting: int


@dataclass(frozen=True)
class Scheduled:
    """`query_len` tokens of `sequence`, starting at its `computed`, go into the step."""

    sequence: Sequence
    query_len: int

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token for this sequence."""
        return self.query_len == self.sequence.remaining


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
    While `admits` is false nothing new is admitted: whoever set it needs the blocks first.
    """

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.loading: set[Sequence] = set()
        self._loads: list[Load] = []
        self.holding: set[Sequence] = set()
        self.preemptions = 0
        self.admits = True

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens promised and not yet computed."""
        waiting = sum(len(sequence.tokens) for sequence in self.waiting)
        loading = sum(sequence.remaining for sequence in self.loading)
        return waiting + loading + sum(s.remaining for s in self.running if s.remaining > 1)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            PoolTooSmall: it can never fit.
            Overloaded: the queue is full.
        """
        self.require_fit(sequence)
        if len(self.waiting) >= self.limits.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting (--max-waiting)", retry_after_s=1.0)
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
        sequence.blocks, sequence.shared = blocks, held
        sequence.computed = len(sequence.tokens) - 1
        sequence.state = State.RUNNING
        self._share_full_blocks(sequence)
        self.running.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step; empty when there is nothing to compute.

        Every scheduled sequence owns the blocks its tokens go to and is marked in flight until
        `advance` or `release`.
        """
        batch: list[Scheduled] = []
        budget = self.limits.max_batch_tokens
        for sequence in list(self.running):
            if sequence.state is State.RUNNING and sequence.remaining == 1 and budget > 0:
                if not self._grow(sequence, batch):
                    continue
                batch.append(Scheduled(sequence, 1))
                budget -= 1
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                take = min(sequence.remaining, budget)
                batch.append(Scheduled(sequence, take))
                budget -= take
        while (
            self.admits
            and budget > 0
            and self.waiting
            and len(self.running) + len(self.loading) < self.limits.max_batch_requests
        ):
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            if sequence.state is State.LOADING:
                continue
            take = min(sequence.remaining, budget)
            batch.append(Scheduled(sequence, take))
            budget -= take
        for scheduled in batch:
            scheduled.sequence.in_flight = True
        return batch

    def advance(self, scheduled: Scheduled) -> None:
        """Record that a scheduled sequence's tokens were computed. Call before appending its new token."""
        sequence = scheduled.sequence
        sequence.in_flight = False
        sequence.computed += scheduled.query_len
        self._share_full_blocks(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Keep the blocks of finished prefill work until `release`."""
        self.running.remove(sequence)
        sequence.state = State.HOLDING
        self.holding.add(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out and free its blocks; nothing may be computed into or loaded into them."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.HOLDING:
            self.holding.remove(sequence)
        elif sequence.state is State.LOADING:
            self.loading.remove(sequence)
        self._free_blocks(sequence)
        sequence.state = State.FINISHED

    def sequences(self) -> Iterable[Sequence]:
        """Every sequence that is not finished."""
        yield from self.waiting
        yield from self.running
        yield from self.loading
        yield from self.holding

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
            self._loads.append(Load(held, loading, partial(self._loaded, sequence)))
        else:
            self._begin(sequence)
        return True

    def take_loads(self) -> list[Load]:
        """Loads that `schedule` asked for since the last call; the caller carries them out."""
        loads, self._loads = self._loads, []
        return loads

    def _loaded(self, sequence: Sequence, good: int) -> None:
        """The first `good` of the blocks being brought up hold their KV; the rest is computed."""
        sequence.computed += good * sequence.block_size
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
        self.running.append(sequence)

    def _grow(self, sequence: Sequence, batch: list[Scheduled]) -> bool:
        """Give a decoding sequence the block of its next token; False if it was itself preempted."""
        while len(sequence.blocks) < sequence.blocks_for(len(sequence.tokens)):
            try:
                sequence.blocks += self.pool.allocate(1)
            except NoFreeBlocks:
                victim = self._youngest(batch)
                if victim is None:
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False
        return True

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

    def _free_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.shared = [], 0, 0

    def _share_full_blocks(self, sequence: Sequence) -> None:
        full = sequence.computed // sequence.block_size
        if full == sequence.shared:
            return
        chain = sequence.chain(full)
        for index in range(sequence.shared, full):
            parent = chain[index - 1] if index else None
            sequence.blocks[index] = self.pool.share(sequence.blocks[index], chain[index], parent)
        sequence.shared = full
