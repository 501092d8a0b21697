"""Which Redis a URL means: one server, one that Sentinels name, or a Cluster.

    redis://user:password@host:6379/0                      rediss:// for TLS; options as redis-py takes them
    redis+sentinel://user:password@host:26379,host:26379/mymaster/0
    redis+cluster://user:password@host:6379,host:6379      and rediss+sentinel://, rediss+cluster:// for TLS

User and password are those of the data servers, by ACL or `requirepass`; Sentinels have their own as the
options `sentinel_username` and `sentinel_password`.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from baton.config import BadSetting

TIMEOUT_S = 2.0

_FORMS = "redis://host:port/db, redis+sentinel://host:port,host:port/service/db or redis+cluster://host:port,host:port"
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")

Client = redis.asyncio.Redis | RedisCluster


def connect(url: str) -> Client:
    """A client for the Redis that `url` means; it connects when it is first used.

    Raises:
        BadSetting: `url` is none of the forms above.
    """
    scheme, _, rest = url.partition("://")
    kind = scheme.removeprefix("rediss").removeprefix("redis")
    if not rest or not scheme.startswith("redis") or kind not in ("", "+sentinel", "+cluster"):
        raise _bad(url, "it has another form")
    try:
        if not kind:
            return redis.asyncio.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        return _connect_many(url, kind)
    except ValueError as error:
        raise _bad(url, str(error)) from error


def _connect_many(url: str, kind: str) -> Client:
    parts = urlsplit(url)
    account, _, hosts = parts.netloc.rpartition("@")
    nodes = [_node(host, 26379 if kind == "+sentinel" else 6379) for host in hosts.split(",")]
    user, _, password = account.partition(":")
    options: dict[str, Any] = {
        "username": unquote(user) or None,
        "password": unquote(password) or None,
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "ssl": parts.scheme.startswith("rediss"),
    }
    given = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    allowed = _TLS_OPTIONS + (_SENTINEL_OPTIONS if kind == "+sentinel" else ())
    unknown = given.keys() - set(allowed)
    if unknown:
        raise ValueError(f"option {min(unknown)} is not one of {', '.join(allowed)}")
    options |= {name: value for name, value in given.items() if name in _TLS_OPTIONS}
    path = [part for part in parts.path.split("/") if part]
    if kind == "+cluster":
        if path:
            raise ValueError("a Cluster has no databases to choose from")
        return RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in nodes],
            retry=Retry(NoBackoff(), 1),  # once more, after a node has moved
            **options,
        )
    if len(path) not in (1, 2) or not all(part.isdigit() for part in path[1:]):
        raise ValueError("it needs the service's name and may have a database: /mymaster/0")
    to_sentinels = {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "ssl": options["ssl"],
        "username": given.get("sentinel_username"),
        "password": given.get("sentinel_password"),
        **{name: value for name, value in given.items() if name in _TLS_OPTIONS},
    }
    if not options["ssl"]:
        del to_sentinels["ssl"], options["ssl"]
    sentinel = Sentinel(nodes, sentinel_kwargs=to_sentinels)  # type: ignore[no-untyped-call]
    database = int(path[1]) if len(path) > 1 else 0
    master: Client = sentinel.master_for(path[0], db=database, retry=Retry(NoBackoff(), 0), **options)
    return master


def _node(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} is no host:port")
    return parts.hostname, parts.port or default_port


def _bad(url: str, reason: str) -> BadSetting:
    shown = url.rpartition("@")[2]  # a password is not for logs
    return BadSetting(f"--redis must be {_FORMS}, got {shown!r}: {reason}", field="redis")
