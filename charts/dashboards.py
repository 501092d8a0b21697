"""How the Grafana dashboards in charts/baton/dashboards are made: `python charts/dashboards.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "baton" / "dashboards"
_SOURCE = {"type": "prometheus", "uid": "$datasource"}
_WIDTH, _HEIGHT, _PER_ROW = 8, 8, 3


@dataclass(frozen=True)
class Query:
    """One PromQL query; `SELECT` in it stands for the labels that say which installation is meant."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A graph over time. `unit` is Grafana's name for it, `help` what the reader should know."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    help: str = ""
    most: float | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One page; `by_worker` lets its reader choose the worker pod that SELECT means."""

    name: str
    title: str
    panels: Sequence[Panel]
    by_worker: bool = False


def quantiles(histogram: str, *shares: float) -> list[Query]:
    """The quantiles of a histogram over the last minute."""
    return [
        Query(
            f"histogram_quantile({share}, sum by (le) (rate({histogram}_bucket{{SELECT}}[1m])))",
            f"p{share * 100:g}",
        )
        for share in shares or (0.5, 0.9, 0.99)
    ]


def rate(counter: str, *by: str, legend: str = "") -> Query:
    """How fast a counter grows, apart by labels."""
    grouped = f" by ({', '.join(by)})" if by else ""
    return Query(
        f"sum{grouped} (rate({counter}{{SELECT}}[1m]))", legend or " ".join(f"{{{{{one}}}}}" for one in by)
    )


def share(part: str, whole: str, legend: str, *by: str) -> Query:
    """The share of one counter in another over the last minutes."""
    grouped = f" by ({', '.join(by)})" if by else ""
    rates = (f"sum{grouped} (rate({one}{{SELECT}}[5m]))" for one in (part, whole))
    return Query(" / ".join(rates), legend)


def level(gauge: str, *by: str, legend: str = "") -> Query:
    """A gauge's sum, apart by labels."""
    grouped = f" by ({', '.join(by)})" if by else ""
    return Query(f"sum{grouped} ({gauge}{{SELECT}})", legend or " ".join(f"{{{{{one}}}}}" for one in by))


OVERVIEW = Dashboard(
    "overview",
    "baton / overview",
    [
        Panel("Time to first token", quantiles("vllm:time_to_first_token_seconds"), "s"),
        Panel("Between tokens", quantiles("vllm:inter_token_latency_seconds"), "s"),
        Panel("Whole answer", quantiles("vllm:e2e_request_latency_seconds"), "s"),
        Panel(
            "Goodput",
            [
                share("baton_router_good_choices_total", "baton_router_choices_total", "{{slo}}", "slo"),
            ],
            "percentunit",
            "Answers that kept --slo-ttft-s and --slo-tpot-s.",
            1,
        ),
        Panel(
            "Tokens per second",
            [
                rate("vllm:prompt_tokens_total", legend="prompt"),
                rate("vllm:generation_tokens_total", legend="generated"),
            ],
        ),
        Panel(
            "Answers per second, by how they ended", [rate("vllm:request_success_total", "finished_reason")]
        ),
        Panel(
            "Requests",
            [
                level("vllm:num_requests_running", "job", legend="running: {{job}}"),
                level("vllm:num_requests_waiting", "job", legend="waiting: {{job}}"),
            ],
            help="A router's are choices in flight; a worker's those in its batch.",
        ),
        Panel("Refused per second", [rate("baton_router_rejected_total", "reason")]),
        Panel(
            "KV pool in use",
            [Query("vllm:kv_cache_usage_perc{SELECT}", "{{pod}}")],
            "percentunit",
            most=1,
        ),
        Panel(
            "Where prompt tokens' KV came from",
            [rate("baton_prompt_tokens_total", "source")],
            stacked=True,
        ),
        Panel(
            "Busy",
            [Query("rate(baton_engine_busy_seconds_total{SELECT}[1m])", "{{pod}}")],
            "percentunit",
            "Share of time in which a worker had something to compute.",
            1,
        ),
        Panel(
            "Trouble",
            [
                rate("baton_router_replacements_total", "reason", legend="placed anew: {{reason}}"),
                rate("vllm:num_preemptions_total", legend="preempted"),
                level("baton_router_workers_backed_off", legend="workers avoided"),
            ],
        ),
    ],
)

WORKER = Dashboard(
    "worker",
    "baton / one worker",
    [
        Panel(
            "Requests",
            [
                level("vllm:num_requests_running", legend="running"),
                level("vllm:num_requests_waiting", legend="waiting"),
            ],
        ),
        Panel("Queue", quantiles("vllm:request_queue_time_seconds"), "s"),
        Panel("Prefill", quantiles("vllm:request_prefill_time_seconds"), "s"),
        Panel("Decode", quantiles("vllm:request_decode_time_seconds"), "s"),
        Panel(
            "KV blocks",
            [
                level("baton_kv_free_blocks", legend="free"),
                level("baton_kv_cached_blocks", legend="in the prefix tree"),
                level("baton_kv_host_blocks", legend="in host memory"),
                level("baton_kv_disk_blocks", legend="on disk"),
            ],
        ),
        Panel(
            "Prefix cache hits",
            [share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "hits")],
            "percentunit",
            most=1,
        ),
        Panel("Tokens computed per second", [rate("baton_engine_computed_tokens_total", legend="tokens")]),
        Panel("Steps per second", [rate("baton_engine_steps_total", legend="steps")]),
        Panel(
            "Use of the device",
            [
                Query(
                    "sum(rate(baton_engine_flops_total{SELECT}[1m])) "
                    "/ sum(baton_device_peak_flops_per_second{SELECT})",
                    "MFU",
                ),
                Query(
                    "sum(rate(baton_engine_read_bytes_total{SELECT}[1m])) "
                    "/ sum(baton_device_peak_bytes_per_second{SELECT})",
                    "MBU",
                ),
            ],
            "percentunit",
            "By the model's shape and the GPU's data sheet; nothing on a CPU, which has no such figures.",
        ),
    ],
    by_worker=True,
)

FABRIC = Dashboard(
    "kv-fabric",
    "baton / KV fabric",
    [
        Panel("KV read", [rate("baton_kv_transfer_bytes_total", "pod", "transport")], "Bps"),
        Panel(
            "Speed while reading",
            [
                Query(
                    "sum by (transport) (rate(baton_kv_transfer_bytes_total{SELECT}[1m])) "
                    "/ sum by (transport) (rate(baton_kv_transfer_seconds_sum{SELECT}[1m]))",
                    "{{transport}}",
                )
            ],
            "Bps",
        ),
        Panel(
            "Speed measured, slowest pair",
            [Query("min(baton_peer_read_bytes_per_second{SELECT})", "")],
            "Bps",
        ),
        Panel("One read", quantiles("baton_kv_transfer_seconds"), "s"),
        Panel("Handoffs per second, by end", [rate("baton_handoffs_total", "outcome")]),
        Panel(
            "Phases of a handoff, p90",
            [
                Query(
                    "histogram_quantile(0.9, sum by (le, phase) "
                    "(rate(baton_handoff_phase_seconds_bucket{SELECT}[1m])))",
                    "{{phase}}",
                )
            ],
            "s",
            "Tail is what is not hidden behind the prefill.",
        ),
        Panel("Pulls per second, by outcome", [rate("baton_pulls_total", "outcome")]),
        Panel("Blocks from lower tiers per second", [rate("baton_kv_tier_fetched_blocks_total", "tier")]),
        Panel("Lower tiers' misses per second", [rate("baton_kv_tier_misses_total", "tier", "reason")]),
    ],
)

ROUTING = Dashboard(
    "routing",
    "baton / routing",
    [
        Panel("Placements per second", [rate("baton_router_placements_total", "kind")], stacked=True),
        Panel("Prediction off by", quantiles("baton_router_prediction_error_seconds"), "s"),
        Panel(
            "Predicted to actual seconds",
            [
                Query(
                    "sum(rate(baton_router_predicted_seconds_total{SELECT}[5m])) "
                    "/ sum(rate(baton_router_actual_seconds_total{SELECT}[5m]))",
                    "ratio",
                )
            ],
            help="Of queue and prefill; 1 is right on average.",
        ),
        Panel(
            "Waiting in the routers",
            [
                Query(
                    "histogram_quantile(0.9, sum by (le, slo) "
                    "(rate(baton_router_queue_seconds_bucket{SELECT}[1m])))",
                    "{{slo}} p90",
                )
            ],
            "s",
        ),
        Panel("Requests waiting, by class", [level("baton_router_queue_requests", "slo")]),
        Panel("Placed anew per second", [rate("baton_router_replacements_total", "reason")]),
        Panel("Index, blocks", [Query("baton_index_blocks{SELECT}", "{{pod}}")]),
        Panel("Index, memory", [Query("baton_index_bytes{SELECT}", "{{pod}}")], "bytes"),
        Panel(
            "Index, behind by",
            [Query("baton_index_lag_seconds{SELECT}", "{{pod}}")],
            "s",
            "0 while the router hears from the kvstore.",
        ),
    ],
)

DASHBOARDS = (OVERVIEW, WORKER, FABRIC, ROUTING)


def render(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    select = 'namespace="$namespace"' + (', pod="$pod"' if dashboard.by_worker else "")
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        _variable("namespace", "label_values(baton_router_kvstore_connected, namespace)"),
    ]
    if dashboard.by_worker:
        variables.append(_variable("pod", 'label_values(baton_worker_info{namespace="$namespace"}, pod)'))
    return {
        "title": dashboard.title,
        "uid": f"baton-{dashboard.name}",
        "tags": ["baton", "llm"],
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": [_panel(panel, at, select) for at, panel in enumerate(dashboard.panels)],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {"name": name, "type": "query", "datasource": _SOURCE, "query": query, "refresh": 2}


def _panel(panel: Panel, at: int, select: str) -> dict[str, Any]:
    row, column = divmod(at, _PER_ROW)
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 30}
    return {
        "id": at + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "legendFormat": query.legend,
                "expr": query.expr.replace("SELECT", select),
            }
            for number, query in enumerate(panel.queries)
        ],
    }


def main() -> None:
    """Write every dashboard, and remove what is no dashboard any more."""
    FOLDER.mkdir(exist_ok=True)
    for stale in FOLDER.glob("*.json"):
        stale.unlink()
    for dashboard in DASHBOARDS:
        text = json.dumps(render(dashboard), indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{dashboard.name}.json").write_text(text)


if __name__ == "__main__":
    main()
