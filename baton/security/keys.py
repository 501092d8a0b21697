"""Which API keys there are: their file, which holds hashes only, and how keys are made and revoked."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from baton.errors import BatonError

PREFIX = "sk-baton-"
_SECRET_BYTES = 32

Id = Annotated[str, Meta(min_length=1, max_length=64)]
Tenant = Annotated[str, Meta(max_length=256)]
Weight = Annotated[float, Meta(gt=0.0, le=1e6)]
PerMinute = Annotated[int, Meta(ge=0, le=10**12)]


class BadKeyFile(BatonError):
    """The file of API keys cannot be used; the message says where and why."""


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One key. A key is 256 random bits, so one plain SHA-256 hides it: there is nothing to guess.

    `tenant` empty: requests of no tenant, or of the one a trusted proxy names. `weight` is the tenant's share
    where tenants wait for each other. Limits are per minute and router; 0 is none. `revoked` keys are kept
    so that their holders are told so.
    """

    id: Id
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    tenant: Tenant = ""
    weight: Weight = 1.0
    requests_per_minute: PerMinute = 0
    tokens_per_minute: PerMinute = 0
    created: str = ""
    revoked: bool = False


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[ApiKey]


def new_key(
    *, tenant: str = "", weight: float = 1.0, requests_per_minute: int = 0, tokens_per_minute: int = 0
) -> tuple[str, ApiKey]:
    """A new key: the secret, which is kept nowhere, and what the file keeps of it."""
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    return secret, ApiKey(
        id=secrets.token_hex(4),
        sha256=hash_of(secret).hex(),
        tenant=tenant,
        weight=weight,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def hash_of(secret: str) -> bytes:
    """What is compared, and in hex kept, of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def read_keys(path: Path) -> list[ApiKey]:
    """
    Raises:
        BadKeyFile: the file is not there, not of this form, or contradicts itself.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadKeyFile(f"{path}: cannot be read: {error.strerror}; `baton keys new` makes one") from error
    return parse_keys(content, path)


def parse_keys(content: bytes, path: Path) -> list[ApiKey]:
    """The keys in the content of the file `path`.

    Raises:
        BadKeyFile: it is not of this form, or contradicts itself.
    """
    try:
        keys = msgspec.json.decode(content, type=_File).keys
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadKeyFile(f"{path}: not a file of API keys: {error}") from error
    weights: dict[str, float] = {}
    for key in keys:
        if weights.setdefault(key.tenant, key.weight) != key.weight:
            raise BadKeyFile(f"{path}: tenant {key.tenant!r} has keys of different weight; give all the same")
    for name, values in (("id", [key.id for key in keys]), ("sha256", [key.sha256 for key in keys])):
        if len(set(values)) != len(values):
            raise BadKeyFile(f"{path}: two keys have the same {name}")
    return keys


def write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """Replace the file in one step, readable by its owner alone: a router may read it at any moment.

    Raises:
        BadKeyFile: it cannot be written, or could not be read again.
    """
    content = msgspec.json.format(msgspec.json.encode(_File(list(keys))), indent=2) + b"\n"
    parse_keys(content, path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise BadKeyFile(f"{path}: cannot be written: {error.strerror}") from error
