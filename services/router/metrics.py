"""What the router counts. Names are vLLM's where they mean the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client import Histogram as PlainHistogram

from baton.metrics import (
    FIRST_TOKEN_BUCKETS_S,
    INTERVAL_BUCKETS_S,
    REQUEST_BUCKETS_S,
    Histogram,
    token_buckets,
)
from baton.sampling import FinishReason
from services.router.timeline import Timeline


class Metrics:
    """One router's metrics, all labelled with the model; rendered by `render`."""

    def __init__(self, model: str, longest: int) -> None:
        """`longest` is the most tokens that prompt and output can have together."""
        self._registry = registry = CollectorRegistry()
        label = ["model_name"]

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            made = Histogram(name, text, {"model_name": model}, buckets)
            registry.register(made)
            return made

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, label, registry=registry).labels(model)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds",
            "Seconds from arrival to the first token.",
            FIRST_TOKEN_BUCKETS_S,
        )
        self.interval = histogram(
            "vllm:inter_token_latency_seconds", "Seconds between tokens of a choice.", INTERVAL_BUCKETS_S
        )
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean seconds between the tokens of a choice, once per choice.",
            INTERVAL_BUCKETS_S,
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from arrival to the last token.", REQUEST_BUCKETS_S
        )
        self._prompt_length = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of choices that ended.", token_buckets(longest)
        )
        self._output_length = histogram(
            "vllm:request_generation_tokens", "Tokens of choices that ended.", token_buckets(longest)
        )
        self.prediction_error = histogram(
            "baton_router_prediction_error_seconds",
            "Seconds by which the prediction of a prompt's queue and prefill was off, either way.",
            FIRST_TOKEN_BUCKETS_S,
        )
        self._arrived = Counter(
            "baton_router_arrived_choices",
            "Choices that clients asked for, let in or not.",
            registry=registry,
        )
        self._arrived_tokens = Counter(
            "baton_router_arrived_prompt_tokens", "Prompt tokens of these choices.", registry=registry
        )
        self._cached = Counter(
            "baton_router_cached_prompt_tokens",
            "Prompt tokens of choices that ended whose KV was not computed for them.",
            registry=registry,
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of placed choices.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.predicted_seconds = Counter(
            "baton_router_predicted_seconds",
            "Seconds of queue and prefill predicted for placements that gave a first token.",
            registry=registry,
        )
        self.actual_seconds = Counter(
            "baton_router_actual_seconds",
            "Seconds of queue and prefill that they then took.",
            registry=registry,
        )
        ended = Counter("baton_router_choices", "Choices that ended.", ["slo"], registry=registry)
        good = Counter(
            "baton_router_good_choices",
            "Choices that ended within --slo-ttft-s and --slo-tpot-s; of batch, that ended well.",
            ["slo"],
            registry=registry,
        )
        self._ended = {slo: ended.labels(slo) for slo in ("interactive", "batch")}
        self._good = {slo: good.labels(slo) for slo in ("interactive", "batch")}
        self.running = Gauge(
            "vllm:num_requests_running", "Choices in flight.", label, registry=registry
        ).labels(model)
        queue_seconds = PlainHistogram(
            "baton_router_queue_seconds",
            "Seconds requests waited in the router before they were placed.",
            ["slo"],
            registry=registry,
            buckets=REQUEST_BUCKETS_S,
        )
        self.queue_seconds = {slo: queue_seconds.labels(slo) for slo in ("interactive", "batch")}
        self.prefills_beside = Gauge(
            "baton_router_prefills_beside",
            "1 where the policy has decode workers compute prompts, too.",
            registry=registry,
        )
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
        success = Counter(
            "vllm:request_success", "Choices that ended.", [*label, "finished_reason"], registry=registry
        )
        self._success = {reason.value: success.labels(model, reason.value) for reason in FinishReason}
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
        self._moves = Counter(
            "baton_router_moves_total",
            "Choices that were to move, with their KV, from a worker that gave them up, by outcome.",
            ["outcome"],
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

    def predicted(self, predicted_s: float, actual_s: float) -> None:
        """What a placement's queue and prefill were predicted to take, and took."""
        self.prediction_error.observe(abs(actual_s - predicted_s))
        self.predicted_seconds.inc(predicted_s)
        self.actual_seconds.inc(actual_s)

    def ended(self, choice: Timeline, *, good: bool) -> None:
        """A choice is over, however it ended."""
        self._generation_tokens.inc(choice.output_tokens)
        self._ended[choice.slo].inc()
        if good:
            self._good[choice.slo].inc()
        if choice.outcome in self._success:
            self._success[choice.outcome].inc()
            self._whole.observe(choice.last_s - choice.arrived_s)
            self._prompt_length.observe(choice.prompt_tokens)
            if choice.prefill is not None:
                self._cached.inc(choice.prefill.cached_tokens)
            self._output_length.observe(choice.output_tokens)
            if choice.output_tokens > 1:
                self._per_token.observe(choice.tpot_s)

    def arrived(self, prompt_tokens: Sequence[int]) -> None:
        """A request came, with a choice for each of these lengths of prompts."""
        self._arrived.inc(len(prompt_tokens))
        self._arrived_tokens.inc(sum(prompt_tokens))

    def placed(self, kind: str, policy: str) -> None:
        self._placements.labels(kind, policy).inc()

    def replaced(self, reason: str) -> None:
        self._replacements.labels(reason).inc()

    def moved(self, outcome: str) -> None:
        """A move ended: `moved`, `refused` by a target while the choice goes on, or `lost`."""
        self._moves.labels(outcome).inc()

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
