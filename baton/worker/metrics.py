"""What a worker counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

KV_TRANSFER_BYTES = Counter("baton_kv_transfer_bytes", "Bytes of KV read from other workers")
KV_TRANSFER_BLOCKS = Counter("baton_kv_transfer_blocks", "Blocks of KV read from other workers")
KV_TRANSFER_SECONDS = Histogram(
    "baton_kv_transfer_seconds",
    "Seconds of one read of KV blocks from another worker",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
HANDOFFS = Counter("baton_handoffs", "Handoffs read by this worker, by how they ended", ["outcome"])
PREFILLS = Counter("baton_prefills", "First tokens produced for requests decoded here, by where", ["kind"])
PREEMPTIONS = Gauge("baton_preemptions", "Sequences that gave up their blocks and were recomputed")
STEPS = Gauge("baton_engine_steps", "Engine steps computed")
COMPUTED_TOKENS = Gauge("baton_engine_computed_tokens", "Tokens whose KV this worker computed")
RUNNING = Gauge("vllm:num_requests_running", "Requests in the batch")
WAITING = Gauge("vllm:num_requests_waiting", "Requests not yet admitted")
KV_USAGE = Gauge("vllm:kv_cache_usage_perc", "Share of KV blocks that a request or handoff names, 0 to 1")
CACHED_BLOCKS = Gauge("baton_kv_cached_blocks", "Blocks in the prefix tree")
