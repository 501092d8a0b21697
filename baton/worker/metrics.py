"""What a worker counts, for Prometheus; names are vLLM's where they mean the same. docs/observability.md
lists them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client import Histogram as PlainHistogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.engine.costs import Costs, Peak
from baton.engine.engine import Engine
from baton.engine.interfaces import Output
from baton.engine.sequence import Sequence as Choice
from baton.kv.events import Tier
from baton.metrics import READ_BUCKETS_S, REQUEST_BUCKETS_S, Histogram

KV_TRANSFER_BYTES = Counter("baton_kv_transfer_bytes", "Bytes of KV read from other workers", ["transport"])
KV_TRANSFER_BLOCKS = Counter(
    "baton_kv_transfer_blocks", "Blocks of KV read from other workers", ["transport"]
)
KV_TRANSFER_SECONDS = PlainHistogram(
    "baton_kv_transfer_seconds",
    "Seconds of one read of KV blocks from another worker",
    ["transport"],
    buckets=READ_BUCKETS_S,
)
KV_VERIFICATIONS = Counter(
    "baton_kv_verifications", "Reads of KV that were compared with the source, by outcome", ["outcome"]
)
HANDOFFS = Counter("baton_handoffs", "Handoffs read by this worker, by how they ended", ["outcome"])
_HANDOFF_PHASE = PlainHistogram(
    "baton_handoff_phase_seconds",
    "Seconds of each phase of a handoff, on the side that reads: until it begins, until the first token, "
    "from there until the last block is here, until it is released",
    ["phase"],
    buckets=READ_BUCKETS_S,
)
HANDOFF_PHASES = {
    phase: _HANDOFF_PHASE.labels(phase) for phase in ("begin", "first_token", "tail", "release")
}
PEER_READ_RATE = Gauge(
    "baton_peer_read_bytes_per_second", "Measured speed of reads from each other worker", ["peer"]
)
PULLS = Counter(
    "baton_pulls", "Prefixes that this worker tried to read from another one, by outcome", ["outcome"]
)
PREFILLS = Counter("baton_prefills", "First tokens produced for requests decoded here, by where", ["kind"])
ROLE_CHANGES = Counter("baton_role_changes", "Times this worker got another role, by the new one", ["role"])
MOVES = Counter(
    "baton_moves", "Requests decoding elsewhere that this worker was to take over, by outcome", ["outcome"]
)
DRAINS = Counter("baton_drains", "Times this worker was drained, by whether all its work ended", ["outcome"])


class RequestMetrics:
    """What is observed once or twice per request, on the worker that computes its prompt or decodes it."""

    def __init__(self, model: str, registry: CollectorRegistry = REGISTRY) -> None:
        labels = {"model_name": model}

        def histogram(name: str, text: str) -> Histogram:
            made = Histogram(name, text, labels, REQUEST_BUCKETS_S)
            registry.register(made)
            return made

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, labels, registry=registry).labels(model)

        self._queue = histogram(
            "vllm:request_queue_time_seconds", "Seconds a prompt waited on the worker that computed it"
        )
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", "Seconds from a prompt's first step to its first new token"
        )
        self._decode = histogram(
            "vllm:request_decode_time_seconds", "Seconds a request decoded on this worker"
        )
        self._queries = counter(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked for in the prefix cache, where they were computed",
        )
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        tokens = Counter(
            "baton_prompt_tokens",
            "Prompt tokens of prompts computed here, by where their KV came from",
            ["source"],
            registry=registry,
        )
        self._tokens = {
            source: tokens.labels(source) for source in ("computed", "cache", "peer", "host", "disk")
        }

    def began(self, output: Output) -> None:
        """A request has its first token, from a prompt that was computed here."""
        choice = output.choice
        cached = choice.cached_tokens or 0
        self._queue.observe(output.queue_s)
        self._prefill.observe(output.prefill_s)
        self._queries.inc(choice.prompt_len)
        self._hits.inc(cached)
        host, disk = (choice.tier_blocks.get(tier, 0) * choice.block_size for tier in (Tier.HOST, Tier.DISK))
        self._tokens["computed"].inc(choice.prompt_len - cached)
        self._tokens["peer"].inc(choice.pulled_tokens)
        self._tokens["host"].inc(host)
        self._tokens["disk"].inc(disk)
        self._tokens["cache"].inc(max(0, cached - choice.pulled_tokens - host - disk))

    def ended(self, choice: Choice) -> None:
        """A request that decoded here has its last token."""
        self._decode.observe(time.monotonic() - choice.decoding_since_s)


@dataclass(frozen=True)
class WorkerFacts:
    """What labels say of a worker; fixed at its start."""

    worker_id: str
    model: str
    device: str
    dtype: str
    transport: str
    attention: str
    block_size: int
    total_blocks: int
    tensor_parallel: int


class EngineCollector(Collector):
    """Reads the engine when Prometheus asks, so nothing is counted twice."""

    def __init__(self, engine: Engine, facts: WorkerFacts, costs: Costs, peak: Peak | None) -> None:
        """`peak` is what the device could do at best, where that is known."""
        self._engine = engine
        self._facts = facts
        self._costs = costs
        self._peak = peak

    def collect(self) -> Iterator[Metric]:
        yield from self._as_vllm()
        yield from self._steps()
        yield from self._tiers()
        yield self._info()

    def _as_vllm(self) -> Iterator[Metric]:
        engine, load, facts = self._engine, self._engine.load(), self._facts
        for name, value, text in (
            ("vllm:num_requests_running", load.running, "Requests in the batch"),
            ("vllm:num_requests_waiting", load.waiting, "Requests not yet admitted"),
            (
                "vllm:kv_cache_usage_perc",
                load.pinned_blocks / load.total_blocks,
                "Share of KV blocks that a request or a handoff names, 0 to 1",
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([facts.model], value)
            yield gauge
        preempted = CounterMetricFamily(
            "vllm:num_preemptions", "Times a request gave up its blocks", labels=["model_name"]
        )
        preempted.add_metric([facts.model], engine.scheduler.preemptions)
        yield preempted
        cache = {
            "model_name": facts.model,
            "block_size": str(facts.block_size),
            "num_gpu_blocks": str(facts.total_blocks),
            "cache_dtype": facts.dtype,
            "enable_prefix_caching": "True",
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV pool; always 1", labels=list(cache))
        info.add_metric(list(cache.values()), 1)
        yield info
        for name, value, text in (
            ("baton_kv_free_blocks", load.free_blocks, "Blocks a new request could get"),
            ("baton_kv_cached_blocks", load.cached_blocks, "Blocks in the prefix tree"),
            ("baton_kv_host_blocks", load.host_blocks, "Blocks in the host tier"),
            ("baton_kv_disk_blocks", load.disk_blocks, "Blocks in the disk tier"),
            ("baton_worker_queued_tokens", load.queued_tokens, "Prompt tokens promised and not yet computed"),
        ):
            yield GaugeMetricFamily(name, text, value=value)

    def _steps(self) -> Iterator[Metric]:
        tally, costs, peak = self._engine.tally, self._costs, self._peak
        for name, value, text in (
            ("baton_engine_steps", tally.steps, "Engine steps computed"),
            ("baton_engine_computed_tokens", tally.computed_tokens, "Tokens whose KV was computed here"),
            ("baton_engine_busy_seconds", tally.busy_s(), "Seconds with something to compute"),
            ("baton_engine_flops", costs.flops(tally), "Arithmetic of the steps, by the model's shape"),
            (
                "baton_engine_read_bytes",
                costs.read_bytes(tally),
                "Bytes of weights and KV that the steps read, by the model's shape",
            ),
        ):
            yield CounterMetricFamily(name, text, value=value)
        if peak is not None:
            text = "What the device can do at best, by its data sheet"
            yield GaugeMetricFamily("baton_device_peak_flops_per_second", text, value=peak.flops_per_s)
            yield GaugeMetricFamily("baton_device_peak_bytes_per_second", text, value=peak.bytes_per_s)

    def _tiers(self) -> Iterator[Metric]:
        tiering = self._engine.tiering
        fetched = CounterMetricFamily(
            "baton_kv_tier_fetched_blocks", "Blocks brought up from a tier", labels=["tier"]
        )
        for tier, blocks in tiering.fetched_blocks.copy().items():
            fetched.add_metric([tier.name.lower()], blocks)
        yield fetched
        misses = CounterMetricFamily(
            "baton_kv_tier_misses",
            "Blocks of a tier that could not be used, by why",
            labels=["tier", "reason"],
        )
        for (tier, reason), blocks in tiering.misses.copy().items():
            misses.add_metric([tier.name.lower(), reason], blocks)
        yield misses

    def _info(self) -> Metric:
        facts = self._facts
        labels = {
            "worker_id": facts.worker_id,
            "device": facts.device,
            "transport": facts.transport,
            "attention": facts.attention,
            "tensor_parallel": str(facts.tensor_parallel),
        }
        info = GaugeMetricFamily("baton_worker_info", "Which worker this is; always 1", labels=list(labels))
        info.add_metric(list(labels.values()), 1)
        return info
