"""One choice as the router's parts hand it to each other, whichever front it came through."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from baton.openai.answer import Piece
from baton.sampling import Sampling
from services.router.caller import Caller


@dataclass(frozen=True, slots=True)
class Generation:
    """What is wanted. `stops` are the router's business, the rest of `sampling` the engine's; it was made at
    the `time.monotonic()` of `tokenized_s`."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: Sampling
    caller: Caller
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    shown_tokens: frozenset[int] = frozenset()  # special ones that are not skipped
    cache_salt: str = ""
    tokenized_s: float = field(default_factory=time.monotonic)

    @property
    def prompt_key(self) -> int:
        """The same for all choices of one prompt of one request, and while they run for no other."""
        return id(self.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class Placed:
    """What came of the first placement that gave a token.

    `prefill` is remote, local or cached; `prefill_worker` is empty unless it is remote;
    `cached_tokens` are prompt tokens whose KV was not computed for this request. `predicted_s` are the
    seconds that the first token was predicted to take from its placement on, `queue_s` those before.
    """

    prefill: str
    decode_worker: str
    prefill_worker: str
    cached_tokens: int
    predicted_s: float
    queue_s: float


Emit = Callable[[Placed, Sequence[Piece]], Awaitable[None]]
"""Takes one choice's pieces in order, those together that came together; the last one has a finish reason.
May wait for a slow client."""
