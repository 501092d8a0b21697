"""What the router counts. Names are vLLM's where they mean the same."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client import Histogram as PlainHistogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

_LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_INTERVAL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 5.0)


class Histogram(Collector):
    """A histogram that is cheap to observe on the path of every token: one thread, one model, no locks."""

    def __init__(self, name: str, text: str, model: str, buckets_s: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._model = model
        self._bounds = tuple(buckets_s)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += times
        self._sum += seconds * times

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        below = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric([self._model], buckets, self._sum)
        return [family]


class Metrics:
    """One router's metrics, all labelled with the model; rendered by `render`."""

    def __init__(self, model: str) -> None:
        self._registry = registry = CollectorRegistry()
        label = ["model_name"]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, model, buckets)
            registry.register(made)
            return made

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, label, registry=registry).labels(model)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "Seconds from arrival to the first token.", _LATENCY_BUCKETS_S
        )
        self.interval = histogram(
            "vllm:inter_token_latency_seconds", "Seconds between tokens of a choice.", _INTERVAL_BUCKETS_S
        )
        self.whole = histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from arrival to the last token.", _LATENCY_BUCKETS_S
        )
        self.prediction_error = histogram(
            "baton_router_prediction_error_seconds",
            "Seconds by which the prediction of a prompt's queue and prefill was off, either way.",
            _LATENCY_BUCKETS_S,
        )
        self._arrived = Counter(
            "baton_router_arrived_choices",
            "Choices that clients asked for, let in or not.",
            registry=registry,
        )
        self._arrived_tokens = Counter(
            "baton_router_arrived_prompt_tokens", "Prompt tokens of these choices.", registry=registry
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of placed choices.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.running = Gauge(
            "vllm:num_requests_running", "Choices in flight.", label, registry=registry
        ).labels(model)
        queue_seconds = PlainHistogram(
            "baton_router_queue_seconds",
            "Seconds requests waited in the router before they were placed.",
            ["slo"],
            registry=registry,
            buckets=_LATENCY_BUCKETS_S,
        )
        self.queue_seconds = {slo: queue_seconds.labels(slo) for slo in ("interactive", "batch")}
        self.kvstore_connected = Gauge(
            "baton_router_kvstore_connected",
            "1 while the kvstore's streams are up; at 0 the router goes on with the last known state.",
            registry=registry,
        )
        self.index_lag_s = Gauge(
            "baton_index_lag_seconds",
            "Seconds since the index replica was last known to be current; 0 while connected.",
            registry=registry,
        )
        self.index_blocks = Gauge(
            "baton_index_blocks", "Entries in the index replica: blocks, once per tier.", registry=registry
        )
        self.index_bytes = Gauge(
            "baton_index_bytes", "Memory that the index replica takes.", registry=registry
        )
        self.index_evicted = Gauge(
            "baton_index_evicted_blocks_total",
            "Entries forgotten because the index replica reached --index-max-bytes.",
            registry=registry,
        )
        self._success = Counter(
            "vllm:request_success", "Choices that ended.", [*label, "finished_reason"], registry=registry
        )
        self._placements = Counter(
            "baton_router_placements_total",
            "Placements that gave a first token, by how the prompt's KV came to be.",
            ["kind", "policy"],
            registry=registry,
        )
        self._replacements = Counter(
            "baton_router_replacements_total",
            "Placements given up for another.",
            ["reason"],
            registry=registry,
        )
        self._backoffs = Counter(
            "baton_router_backoffs_total",
            "Times that requests began to keep away from a worker, by how placements on it broke.",
            ["reason"],
            registry=registry,
        )
        self.workers_backed_off = Gauge(
            "baton_router_workers_backed_off", "Workers that requests keep away from now.", registry=registry
        )
        self._rejected = Counter(
            "baton_router_rejected_total", "Requests refused.", ["reason"], registry=registry
        )
        self._model = model

    def arrived(self, prompt_tokens: Sequence[int]) -> None:
        """A request came, with a choice for each of these lengths of prompts."""
        self._arrived.inc(len(prompt_tokens))
        self._arrived_tokens.inc(sum(prompt_tokens))

    def finished(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def placed(self, kind: str, policy: str) -> None:
        self._placements.labels(kind, policy).inc()

    def replaced(self, reason: str) -> None:
        self._replacements.labels(reason).inc()

    def backed_off(self, reason: str) -> None:
        self._backoffs.labels(reason).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def show_queues(self, waiting: Callable[[], Mapping[str, int]]) -> None:
        """Show what waits in the router, as `waiting` counts it by class."""
        total = Gauge(
            "vllm:num_requests_waiting",
            "Requests waiting in the router.",
            ["model_name"],
            registry=self._registry,
        )
        total.labels(self._model).set_function(lambda: sum(waiting().values()))
        queued = Gauge(
            "baton_router_queue_requests",
            "Requests waiting in the router, by class.",
            ["slo"],
            registry=self._registry,
        )
        for slo in waiting():
            queued.labels(slo).set_function(partial(lambda of: waiting()[of], slo))

    def render(self) -> tuple[bytes, str]:
        """The page Prometheus scrapes, and its content type."""
        return generate_latest(self._registry), "text/plain; version=0.0.4; charset=utf-8"
