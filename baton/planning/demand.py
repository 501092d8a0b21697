"""How much work is coming? Smoothed from what arrives and what waits, never from what comes out.

A saturated cluster answers no faster however much is asked of it, so its output says nothing of demand.
What ended says only how long answers are and how much of prompts was cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from baton.routing import WorkerView

# A burst counts within seconds, a lull only after minutes.
_FAST_S = 10.0
_SLOW_S = 60.0
# For how long an answer counts towards how long answers are.
_LENGTHS_S = 120.0


@dataclass(frozen=True)
class Arrived:
    """Requests that came since the last look, answered or not."""

    requests: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Ended:
    """Requests that ended since the last look; `decode_s` is from their first to their last tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Need:
    """What has to be done.

    Attributes:
        prompts_per_s: that have to be computed to keep up and to catch up.
        arriving_per_s: those of them that arrive.
        prompt_tokens: of one of them, those to be computed.
        decoding: requests that will decode at once (Little's law), or already do if those are more.
        request_tokens: of prompt and output of one request.
        tpot_s: that tokens of an answer took lately; 0 when nothing is known.
    """

    prompts_per_s: float
    arriving_per_s: float
    prompt_tokens: float
    decoding: float
    request_tokens: float
    tpot_s: float


class Demand:
    """Smooths what is seen. `catch_up_s` is how soon what waits now should be under way."""

    def __init__(self, catch_up_s: float) -> None:
        self._catch_up_s = catch_up_s
        self._requests = _Rate()
        self._prompt_tokens = _Rate()
        self._ended = [0.0] * 5

    def see(
        self,
        elapsed_s: float,
        arrived: Arrived,
        ended: Ended,
        waiting: int,
        workers: Sequence[WorkerView],
    ) -> Need:
        """What has to be done, after `elapsed_s` in which so much arrived and ended.

        Args:
            waiting: requests in routers that no worker has been given.
        """
        self._requests.add(arrived.requests, elapsed_s)
        self._prompt_tokens.add(arrived.prompt_tokens, elapsed_s)
        kept = exp(-elapsed_s / _LENGTHS_S)
        now = (ended.requests, ended.prompt_tokens, ended.cached_tokens, ended.output_tokens, ended.decode_s)
        self._ended = [kept * old + new for old, new in zip(self._ended, now, strict=True)]
        answers, prompts, cached, outputs, decode_s = self._ended
        arriving_per_s = self._requests.value
        length = self._prompt_tokens.value / arriving_per_s if arriving_per_s else 0.0
        computed = length * (1 - cached / prompts) if prompts else length
        output = outputs / answers if answers else 0.0
        queued = sum(worker.queued_tokens for worker in workers) / computed if computed else 0.0
        under_way = sum(worker.running + worker.waiting for worker in workers if worker.role.decodes)
        return Need(
            prompts_per_s=arriving_per_s + (queued + waiting) / self._catch_up_s,
            arriving_per_s=arriving_per_s,
            prompt_tokens=computed,
            decoding=max(float(under_way), arriving_per_s * decode_s / answers if answers else 0.0),
            request_tokens=length + output,
            tpot_s=decode_s / outputs if outputs else 0.0,
        )


class _Rate:
    """Something per second: as it has been for seconds or for minutes, whichever is more."""

    def __init__(self) -> None:
        self._fast: float | None = None
        self._slow = 0.0

    @property
    def value(self) -> float:
        return max(self._fast or 0.0, self._slow)

    def add(self, amount: float, elapsed_s: float) -> None:
        now = amount / elapsed_s
        if self._fast is None:
            self._fast = self._slow = now
            return
        self._fast += (1 - exp(-elapsed_s / _FAST_S)) * (now - self._fast)
        self._slow += (1 - exp(-elapsed_s / _SLOW_S)) * (now - self._slow)
