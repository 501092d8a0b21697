"""What sends requests and times their tokens: the interface, and what its clients have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import nan
from types import TracebackType

from baton.bench.load import LoadRequest
from baton.bench.records import Gaps, RequestRecord, mooncake_tbt_s
from baton.errors import BatonError

Clock = Callable[[], float]
"""Seconds since the run began."""


class NobodyAnswers(BatonError):
    """There is no server where one was expected, or it is not one of the expected kind."""


class Arrivals:
    """Tokens of one request as they come in. `at` is called once for what came together."""

    __slots__ = ("_gaps", "cached_tokens", "first_s", "input_tokens", "last_s", "output_tokens", "pieces")

    def __init__(self) -> None:
        self.first_s = self.last_s = nan
        self.pieces = 0
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cached_tokens = 0
        self._gaps: list[tuple[float, int]] = []

    def at(self, now_s: float) -> None:
        """A piece of the answer came."""
        if self.pieces:
            self._gaps.append((now_s - self.last_s, 1))
        else:
            self.first_s = now_s
        self.last_s = now_s
        self.pieces += 1

    def record(
        self, request: LoadRequest, scheduled_s: float, sent_s: float, error: str, gaps: Gaps
    ) -> RequestRecord:
        """What came of the request; adds its gaps to `gaps`."""
        for gap_s, times in self._gaps:
            gaps.add(gap_s, times)
        outputs = self.pieces if self.output_tokens is None else self.output_tokens
        if not error and not outputs:
            error = "no tokens"
        return RequestRecord(
            scheduled_s,
            sent_s,
            self.first_s,
            self.last_s,
            request.input_tokens if self.input_tokens is None else self.input_tokens,
            outputs,
            self.cached_tokens,
            mooncake_tbt_s(self._gaps),
            error,
        )


class Client(ABC):
    """Sends requests to one server. An async context manager: connections live while it is open."""

    takes_token_ids: bool
    """Whether prompts may be token ids."""

    @abstractmethod
    async def __aenter__(self) -> Client: ...

    @abstractmethod
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    @abstractmethod
    async def model(self) -> str:
        """The name of the first model the server has.

        Raises:
            NobodyAnswers: there is no such server.
        """

    @abstractmethod
    async def send(self, request: LoadRequest, tokens: Arrivals, clock: Clock) -> str:
        """Send a request and note its tokens as they come; why it failed, empty when it did not."""

    async def calibrate(self) -> float:
        """How many of the words that prompts are made of make a token: measured with two short requests.

        Raises:
            NobodyAnswers: the server does not answer them, or does not say how long they were.
        """
        counts = []
        for words in (32, 160):
            tokens = Arrivals()
            request = LoadRequest(0.0, " ".join(["water"] * words), words, 1)
            failed = await self.send(request, tokens, lambda: 0.0)
            if failed:
                raise NobodyAnswers(f"the server does not answer: {failed}")
            if tokens.input_tokens is None:
                return 1.0
            counts.append(tokens.input_tokens)
        per_word = (counts[1] - counts[0]) / 128
        return 1 / per_word if per_word > 0 else 1.0
