"""What a request asks of the sampler, with every default filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why a choice ended. Values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Sampling:
    """One choice's sampling parameters. Ranges are checked where requests come in (the router).

    Stop strings are not here: text is the router's business, tokens are the engine's. `grammar` is what the
    answer must match, in the form that `baton.grammar` gives it; empty: anything.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """`rank` is 1 for the most likely token; `logprob` is in nats, of the model's own distribution
    (before temperature, penalties and bias)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class PositionLogprobs:
    """The chosen token and the most likely ones at a position, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
