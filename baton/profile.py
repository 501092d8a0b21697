"""What `baton profile` writes and the simulator reads: how long steps of a model take on a machine."""

from __future__ import annotations

import msgspec


class PrefillPoint(msgspec.Struct, frozen=True):
    """One prompt of `tokens` tokens, nothing of it cached."""

    tokens: int
    seconds: float


class DecodePoint(msgspec.Struct, frozen=True):
    """One step of `batch` requests that have `context` tokens each."""

    batch: int
    context: int
    seconds: float


class Profile(msgspec.Struct, frozen=True):
    """Step times of one worker."""

    model: str
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    prefill: list[PrefillPoint]
    decode: list[DecodePoint]
