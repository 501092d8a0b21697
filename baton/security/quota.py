"""How much one API key may still ask for now: requests and tokens per minute."""

from __future__ import annotations

from baton.errors import Overloaded

_MINUTE_S = 60.0


class RateLimited(Overloaded):
    """The key has used what it may use for now."""


class _Bucket:
    """Fills evenly, up to what a minute allows; may be overdrawn, and is then shut until it is full again
    by one unit."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def missing_s(self, now_s: float) -> float:
        """Seconds until one unit is there; 0 when it is."""
        rate = self.per_minute / _MINUTE_S
        self._level = min(self.per_minute, self._level + rate * max(0.0, now_s - self._at_s))
        self._at_s = max(self._at_s, now_s)
        return max(0.0, (1.0 - self._level) / rate)

    def take(self, units: int) -> None:
        self._level -= units


class Quota:
    """The limits of one key, and what is left of them. A limit of 0 is none.

    Tokens are those of prompts and answers. An answer's length is not known beforehand, so a request starts
    while anything is left, and what it takes beyond that is owed: over time the rate holds, whatever the
    requests look like.
    """

    def __init__(self, requests_per_minute: int, tokens_per_minute: int, now_s: float) -> None:
        self._requests = _Bucket(requests_per_minute, now_s) if requests_per_minute else None
        self._tokens = _Bucket(tokens_per_minute, now_s) if tokens_per_minute else None

    @property
    def counts_tokens(self) -> bool:
        return self._tokens is not None

    def take_request(self, now_s: float) -> None:
        """
        Raises:
            RateLimited: there were as many requests as may be.
        """
        if self._requests is not None:
            _require(self._requests, now_s, "requests")
            self._requests.take(1)

    def require_tokens(self, now_s: float) -> None:
        """
        Raises:
            RateLimited: there were as many tokens as may be.
        """
        if self._tokens is not None:
            _require(self._tokens, now_s, "tokens")

    def take_tokens(self, tokens: int) -> None:
        """Count tokens that a request has used."""
        if self._tokens is not None:
            self._tokens.take(tokens)


def _require(bucket: _Bucket, now_s: float, unit: str) -> None:
    missing_s = bucket.missing_s(now_s)
    if missing_s > 0:
        raise RateLimited(
            f"this API key may use {bucket.per_minute} {unit} per minute; retry after "
            f"{max(1.0, missing_s):.0f} s",
            retry_after_s=missing_s,
        )
