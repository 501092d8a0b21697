"""May this request come in, and as whom?"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.config import BadSetting
from baton.errors import BatonError, PermissionDenied, Unauthenticated
from baton.security.keys import ApiKey, hash_of, read_keys
from baton.security.quota import Quota
from baton.security.reload import Reloaded


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request may do. `tenant` empty: the caller's key names none, or none is needed."""

    tenant: str = ""
    quota: Quota | None = None


ANYONE = Grant()
"""The grant of everybody where no keys are asked for."""


@dataclass(frozen=True, slots=True)
class _Known:
    digest: bytes
    key: ApiKey
    grant: Grant


@dataclass(frozen=True, slots=True)
class _Keys:
    by_digest: Mapping[bytes, _Known]
    weights: Mapping[str, float]


class Access:
    """Checks the keys that requests bring; without a file of keys everybody may come in.

    The keys follow their file within a second. A key whose limits did not change keeps what it has used.
    """

    def __init__(self, api_keys: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`api_keys` is the setting of that name.

        Raises:
            BadSetting: the file cannot be used.
        """
        self._clock = clock
        self._latest = _Keys({}, {})
        self._keys: Reloaded[_Keys] | None = None
        if api_keys:
            path = Path(api_keys)
            try:
                self._keys = Reloaded([path], lambda: self._load(path), clock=clock)
            except BatonError as error:
                raise BadSetting(f"--api-keys {error.message}", field="api_keys") from error

    def admit(self, authorization: str) -> Grant:
        """The grant of a request with this `Authorization` header, which counts as one request.

        Raises:
            Unauthenticated: it has no key, or one that is not known.
            PermissionDenied: the key was revoked.
            RateLimited: the key has had its requests for now.
        """
        if self._keys is None:
            return ANYONE
        known = self._keys.current().by_digest
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise Unauthenticated("no API key: send `Authorization: Bearer KEY`")
        # The hash is what is looked up and compared, so that time tells nothing about a key.
        digest = hash_of(secret)
        found = known.get(digest)
        if found is None or not hmac.compare_digest(found.digest, digest):
            raise Unauthenticated("this API key is not known here; check it for typing errors")
        if found.key.revoked:
            raise PermissionDenied(f"API key {found.key.id} was revoked; ask for a new one")
        if found.grant.quota is not None:
            found.grant.quota.take_request(self._clock())
        return found.grant

    def weights(self, others: Mapping[str, float]) -> Mapping[str, float]:
        """Each tenant's weight as its keys say now; of tenants without keys, as `others` does."""
        return others if self._keys is None else _Weights(self._keys, others)

    def _load(self, path: Path) -> _Keys:
        before = self._latest.by_digest
        known: dict[bytes, _Known] = {}
        for key in read_keys(path):
            digest = bytes.fromhex(key.sha256)
            old = before.get(digest)
            limits = (key.requests_per_minute, key.tokens_per_minute)
            if old is not None and (old.key.requests_per_minute, old.key.tokens_per_minute) == limits:
                quota = old.grant.quota
            else:
                quota = Quota(*limits, self._clock()) if any(limits) else None
            known[digest] = _Known(digest, key, Grant(key.tenant, quota))
        self._latest = _Keys(
            known, {entry.key.tenant: entry.key.weight for entry in known.values() if entry.key.tenant}
        )
        return self._latest


class _Weights(Mapping[str, float]):
    """The weights of tenants, read when they are asked for: keys change while requests wait."""

    def __init__(self, keys: Reloaded[_Keys], others: Mapping[str, float]) -> None:
        self._keys = keys
        self._others = others

    def __getitem__(self, tenant: str) -> float:
        weight = self._keys.current().weights.get(tenant)
        return self._others[tenant] if weight is None else weight

    def __iter__(self) -> Iterator[str]:
        return iter({**self._others, **self._keys.current().weights})

    def __len__(self) -> int:
        return len({**self._others, **self._keys.current().weights})
