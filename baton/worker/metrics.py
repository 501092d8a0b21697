"""What a worker counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.engine.engine import Engine

KV_TRANSFER_BYTES = Counter("baton_kv_transfer_bytes", "Bytes of KV read from other workers")
KV_TRANSFER_BLOCKS = Counter("baton_kv_transfer_blocks", "Blocks of KV read from other workers")
KV_TRANSFER_SECONDS = Histogram(
    "baton_kv_transfer_seconds",
    "Seconds of one read of KV blocks from another worker",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
KV_VERIFICATIONS = Counter(
    "baton_kv_verifications", "Reads of KV that were compared with the source, by outcome", ["outcome"]
)
HANDOFFS = Counter("baton_handoffs", "Handoffs read by this worker, by how they ended", ["outcome"])
PEER_READ_RATE = Gauge(
    "baton_peer_read_bytes_per_second", "Measured speed of reads from each other worker", ["peer"]
)
PULLS = Counter(
    "baton_pulls", "Prefixes that this worker tried to read from another one, by outcome", ["outcome"]
)
PREFILLS = Counter("baton_prefills", "First tokens produced for requests decoded here, by where", ["kind"])


class EngineCollector(Collector):
    """Reads the engine when Prometheus asks, so nothing is counted twice."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, load = self._engine, self._engine.load()
        counters = {
            "baton_preemptions": (engine.scheduler.preemptions, "Times a request gave up its blocks"),
            "baton_engine_steps": (engine.steps, "Engine steps computed"),
            "baton_engine_computed_tokens": (engine.computed_tokens, "Tokens whose KV was computed here"),
        }
        gauges = {
            "vllm:num_requests_running": (load.running, "Requests in the batch"),
            "vllm:num_requests_waiting": (load.waiting, "Requests not yet admitted"),
            "vllm:kv_cache_usage_perc": (
                load.pinned_blocks / load.total_blocks,
                "Share of KV blocks that a request or a handoff names, 0 to 1",
            ),
            "baton_kv_cached_blocks": (load.cached_blocks, "Blocks in the prefix tree"),
            "baton_kv_host_blocks": (load.host_blocks, "Blocks in the host tier"),
            "baton_kv_disk_blocks": (load.disk_blocks, "Blocks in the disk tier"),
        }
        fetched = CounterMetricFamily(
            "baton_kv_tier_fetched_blocks", "Blocks brought up from a tier", labels=["tier"]
        )
        for tier, blocks in engine.fetched_blocks.copy().items():
            fetched.add_metric([tier.name.lower()], blocks)
        yield fetched
        misses = CounterMetricFamily(
            "baton_kv_tier_misses",
            "Blocks of a tier that could not be used, by why",
            labels=["tier", "reason"],
        )
        for (tier, reason), blocks in engine.tier_misses.copy().items():
            misses.add_metric([tier.name.lower(), reason], blocks)
        yield misses
        for name, (count, help_text) in counters.items():
            yield CounterMetricFamily(name, help_text, value=count)
        for name, (level, help_text) in gauges.items():
            yield GaugeMetricFamily(name, help_text, value=level)
