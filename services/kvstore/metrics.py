"""What the kvstore counts, served as Prometheus text on /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class Metrics:
    """The kvstore's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.workers = Gauge("baton_kvstore_workers", "Live workers.", registry=self.registry)
        self.blocks = Gauge(
            "baton_kvstore_blocks",
            "Blocks in the index, once per worker that holds them.",
            registry=self.registry,
        )
        self.index_bytes = Gauge(
            "baton_index_bytes", "Memory that the workers' blocks take.", registry=self.registry
        )
        self.forgotten_blocks = Gauge(
            "baton_index_evicted_blocks_total",
            "Entries forgotten because the index reached --index-max-bytes.",
            registry=self.registry,
        )
        self.subscribers = Gauge(
            "baton_kvstore_subscribers", "Open index subscriptions.", registry=self.registry
        )
        self.routers = Gauge(
            "baton_kvstore_routers", "Routers that share their reservations.", registry=self.registry
        )
        self.slow_subscribers = Counter(
            "baton_kvstore_slow_subscribers",
            "Subscriptions and watches ended because their reader fell behind.",
            registry=self.registry,
        )
        self.found_chains = Counter(
            "baton_kvstore_found_chains",
            "Chains that routers said they had found, which they do while the index is more than half full.",
            registry=self.registry,
        )
        self.messages = Counter(
            "baton_kvstore_messages",
            "Event messages from workers, by what became of them.",
            ["verdict"],
            registry=self.registry,
        )


class RedisMetrics:
    """How the Redis behind the kvstore is doing; present only where there is one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge(
            "baton_kvstore_redis_up",
            "1 while Redis takes writes, 0 while the kvstore goes on without it.",
            registry=registry,
        )
        self.failures = Counter(
            "baton_kvstore_redis_failures", "Rounds of Redis reads or writes that failed.", registry=registry
        )
        self.lag_s = Gauge(
            "baton_kvstore_redis_lag_seconds",
            "Age of the oldest change that Redis does not have yet; 0 while it has everything.",
            registry=registry,
        )
        self.lost = Counter(
            "baton_kvstore_redis_lost_writes",
            "Workers written anew because Redis no longer had what was written.",
            registry=registry,
        )
        self.blocks = Counter(
            "baton_kvstore_redis_blocks", "Block entries written to Redis.", registry=registry
        )
