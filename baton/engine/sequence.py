"""What the engine knows of one choice of one request."""

from __future__ import annotations

import math
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from baton.kv.events import Tier
from baton.kv.hashing import ChainHasher
from baton.sampling import PositionLogprobs, Sampling


class Work(Enum):
    """What a sequence is here for."""

    GENERATE = auto()  # prefill if needed, then decode to the end
    PREFILL = auto()  # prefill and sample one token; the blocks are then read by another worker


class State(Enum):
    WAITING = auto()  # owns no blocks
    LOADING = auto()  # owns the blocks of its context; the first of them are being brought up
    RUNNING = auto()  # owns the blocks of every token it has computed
    HOLDING = auto()  # finished prefill work, or frozen: blocks pinned until the reader releases them
    ENDING = auto()  # over, and its blocks are freed when the steps it is in have ended
    FINISHED = auto()  # owns no blocks


class Guide(Protocol):
    """Which tokens a sequence may take next; see `baton.grammar.guide.Guide`. `failure` is why it no longer
    knows, or empty."""

    failure: str

    def complete(self, tokens: Tokens[int]) -> bool: ...

    def fill(self, tokens: Tokens[int], address: int, size: int) -> None: ...


@dataclass(eq=False)
class Sequence:
    """A choice being generated. Owned and changed by the engine alone.

    `tokens` is the context so far: prompt, then what was generated (here or before a migration);
    the first `prompt_len` of them are the prompt. The KV of the first `computed` tokens is in
    `blocks`; the first `shared` blocks are in the prefix tree. `cached_tokens` is how much of the
    prompt the cache held when the sequence first ran, `pulled_tokens` the part of it in the blocks that
    were read from another worker for this sequence (`pulled`), `tier_blocks` the blocks brought up for it
    from each lower tier. The first `announced` blocks are known to the reader of prefill work. `chunks` are
    how many tokens each step up to the first new token computed, and when it ended. It is `copied` when its
    blocks were read from a worker that keeps them, and `held_back` until it may decode with the others.
    While it is `frozen` another worker is taking it over. At `deadline_s`, in the engine's time, its client
    stops waiting. `guide` keeps its new tokens to a grammar, if it has one. `owner` is whom outputs are for
    and `traceparent` the trace context of the request; the engine only passes them on.

    The `in_flight` steps that were scheduled and have not ended compute the KV of the `ahead` tokens after
    `computed` and bring `pending` new tokens. `duplicates` are blocks that such a step may still read and
    that others with the same content replaced.
    """

    key: int
    request_id: str
    tokens: list[int]
    prompt_len: int
    sampling: Sampling
    root: bytes
    block_size: int
    cache_salt: str = ""
    traceparent: str = ""
    work: Work = Work.GENERATE
    state: State = State.WAITING
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    shared: int = 0
    cached_tokens: int | None = None
    pulled: range = range(0)
    pulled_tokens: int = 0
    copied: bool = False
    held_back: bool = True
    in_flight: int = 0
    ahead: int = 0
    pending: int = 0
    duplicates: list[int] = field(default_factory=list)
    cancelled: bool = False
    frozen: bool = False
    deadline_s: float = math.inf
    arrived_s: float = 0.0
    first_scheduled_s: float = 0.0
    decoding_since_s: float = 0.0
    chunks: list[tuple[int, float]] = field(default_factory=list)
    tier_blocks: dict[Tier, int] = field(default_factory=dict)
    announced: int = 0
    started: bool = False
    guide: Guide | None = None
    owner: object = None
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    output_counts: dict[int, int] = field(default_factory=dict)
    _chain: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._hasher = ChainHasher(self.root)
        for token in self.tokens[self.prompt_len :]:
            self._count(token)

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be scheduled before the next token can be sampled."""
        return len(self.tokens) + self.pending - self.computed - self.ahead

    @property
    def decodes(self) -> bool:
        """Whether it has begun to generate, and only the KV of its last token is to be computed."""
        return self.output_len > 0 and self.remaining == 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sampling.prompt_logprobs is not None and self.output_len == 0

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self._count(token)

    def chain(self, full_blocks: int) -> list[bytes]:
        """Ids of the first `full_blocks` blocks; all their tokens must be known."""
        known = len(self._chain)
        if known < full_blocks:
            fresh = self.tokens[known * self.block_size : full_blocks * self.block_size]
            self._chain += self._hasher.extend(fresh, self.block_size)
        return self._chain[:full_blocks]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def _count(self, token: int) -> None:
        self.output_counts[token] = self.output_counts.get(token, 0) + 1


def longest_reusable(tokens: Tokens[int], block_size: int) -> int:
    """Full blocks of `tokens` that may come from the cache: at least one token is always computed,
    because its logits choose the next one."""
    return (len(tokens) - 1) // block_size
