"""Every process's metrics after known requests, held against what was asked, docs and dashboards."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import ROOT, Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import until

PROMPTS, TOKENS = (33, 64, 200), 5
HIT = 64  # the second prompt is asked twice: then all but its last block are cached
_ROW = re.compile(r"^\| `((?:vllm:|baton_)\w+)` \| ([^|]+) \|", re.MULTILINE)
_NAME = re.compile(r"(?:vllm:|baton_)\w+")


@dataclass(frozen=True)
class Scraped:
    """One process's page."""

    families: dict[str, Metric]

    def of(self, series: str, **labels: str) -> float:
        """The sum of a series over what has these labels."""
        return sum(
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == series and labels.items() <= sample.labels.items()
        )

    def documented(self) -> set[str]:
        """Names as docs give them: counters with the ending that queries need."""
        return {
            name + ("_total" if family.type == "counter" else "") for name, family in self.families.items()
        }

    @property
    def series(self) -> set[str]:
        """Names that queries may use, also of what has no sample yet."""
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        return {
            name + ending
            for name, family in self.families.items()
            for ending in endings.get(family.type, ("",))
        }


def scrape(address: str) -> Scraped:
    text = httpx.get(f"http://{address.removeprefix('http://')}/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    return Scraped(
        {
            name: family
            for name, family in found.items()
            if _NAME.match(name) and not name.endswith("_created")
        }
    )


@pytest.fixture(scope="module")
def asked(start_cluster: StartCluster) -> Iterator[Cluster]:
    """A cluster that prefills remotely and has answered the prompts, one of them twice, and refused one."""
    with start_cluster("--policy", "round-robin") as cluster:
        draw = random.Random(7)
        prompts = [[draw.randrange(100, 4000) for _ in range(length)] for length in PROMPTS]
        for prompt in [*prompts, prompts[1]]:
            body = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "model": "baton-small"}
            response = httpx.post(f"{cluster.base_url}/v1/completions", json=body, timeout=120)
            assert response.headers["x-baton-prefill"] == "remote"
        refused = httpx.post(
            f"{cluster.base_url}/v1/completions", json={"prompt": [], "model": "baton-small"}
        )
        assert refused.status_code == 400
        # What is counted after an answer is out may come a moment later.
        decode = cluster.status("decode-0").metrics_address
        for address, ended in (
            (cluster.own_url, "vllm:request_success_total"),
            (decode, "vllm:request_decode_time_seconds_count"),
        ):
            until(lambda a=address, e=ended: scrape(a).of(e) == len(prompts) + 1, lambda a=address: scrape(a))
        yield cluster


def test_the_router_counts_what_clients_asked_and_got(asked: Cluster) -> None:
    requests, prompt_tokens = len(PROMPTS) + 1, sum(PROMPTS) + HIT
    page = scrape(asked.own_url)
    assert page.of("vllm:request_success_total", finished_reason="length") == requests
    assert page.of("vllm:prompt_tokens_total", model_name="baton-small") == prompt_tokens
    assert page.of("vllm:generation_tokens_total", model_name="baton-small") == requests * TOKENS
    assert page.of("vllm:time_to_first_token_seconds_count") == requests
    assert page.of("vllm:inter_token_latency_seconds_count") == requests * (TOKENS - 1)
    assert page.of("vllm:e2e_request_latency_seconds_count") == requests
    assert page.of("vllm:request_time_per_output_token_seconds_count") == requests
    assert page.of("vllm:request_prompt_tokens_sum") == prompt_tokens
    assert page.of("vllm:request_generation_tokens_sum") == requests * TOKENS
    assert page.of("vllm:num_requests_running") == page.of("vllm:num_requests_waiting") == 0
    assert page.of("baton_router_choices_total", slo="interactive") == requests
    assert page.of("baton_router_good_choices_total") <= requests
    assert page.of("baton_router_placements_total", kind="remote", policy="round-robin") == requests
    assert page.of("baton_router_rejected_total") == 1
    assert page.of("baton_router_actual_seconds_total") > 0
    assert page.of("baton_router_queue_seconds_count", slo="interactive") == requests


def test_the_prefill_worker_counts_what_it_computed_and_what_its_cache_held(asked: Cluster) -> None:
    requests, prompt_tokens = len(PROMPTS) + 1, sum(PROMPTS) + HIT
    status = asked.status("prefill-0")
    cached = HIT - status.layout.block_size
    page = scrape(status.metrics_address)
    assert page.of("vllm:prefix_cache_queries_total", model_name="baton-small") == prompt_tokens
    assert page.of("vllm:prefix_cache_hits_total") == cached
    assert page.of("baton_prompt_tokens_total", source="computed") == prompt_tokens - cached
    assert page.of("baton_prompt_tokens_total", source="cache") == cached
    assert page.of("baton_prompt_tokens_total") == prompt_tokens
    assert page.of("baton_engine_computed_tokens_total") == prompt_tokens - cached
    assert page.of("vllm:request_queue_time_seconds_count") == requests
    assert page.of("vllm:request_prefill_time_seconds_count") == requests
    assert page.of("vllm:request_decode_time_seconds_count") == 0
    assert (
        page.of("vllm:cache_config_info", block_size="16", num_gpu_blocks=str(status.load.total_blocks)) == 1
    )
    assert 0 < page.of("baton_engine_busy_seconds_total") < time.monotonic()
    assert page.of("baton_engine_flops_total") > 0
    assert page.of("baton_worker_info", worker_id="prefill-0", transport="nixl") == 1


def test_the_decode_worker_counts_what_it_read_and_decoded(asked: Cluster) -> None:
    requests = len(PROMPTS) + 1
    status = asked.status("decode-0")
    page = scrape(status.metrics_address)
    assert page.of("baton_handoffs_total", outcome="released") == requests
    assert page.of("baton_prefills_total", kind="remote") == requests
    assert page.of("vllm:request_decode_time_seconds_count") == requests
    for phase in ("begin", "first_token", "tail", "release"):
        assert page.of("baton_handoff_phase_seconds_count", phase=phase) == requests
    blocks = sum(-(-length // 16) for length in PROMPTS) + 1  # of the prompt asked twice it lacks one
    assert page.of("baton_kv_transfer_blocks_total", transport="nixl") == blocks
    assert page.of("baton_kv_transfer_bytes_total") == blocks * status.layout.block_bytes
    assert page.of("baton_kv_transfer_seconds_count") >= requests
    # The KV of each token but the last was computed here.
    assert page.of("baton_engine_computed_tokens_total") == requests * (TOKENS - 1)
    assert page.of("baton_engine_steps_total") == requests * (TOKENS - 1)


def test_the_kvstore_counts_workers_and_blocks(asked: Cluster) -> None:
    page = scrape(kvstore_metrics(asked))
    assert page.of("baton_kvstore_workers") == 2
    assert page.of("baton_kvstore_routers") == 1
    assert page.of("baton_kvstore_blocks") > 0
    assert page.of("baton_kvstore_messages_total", verdict="apply") > 0


def test_docs_list_what_is_scraped_and_dashboards_ask_for_nothing_else(asked: Cluster) -> None:
    rows = dict(_ROW.findall((ROOT / "docs" / "observability.md").read_text()))
    pages = {
        "router": scrape(asked.own_url),
        "worker": scrape(asked.status("decode-0").metrics_address),
        "kvstore": scrape(kvstore_metrics(asked)),
    }
    for process, page in pages.items():
        listed = {name for name, where in rows.items() if process in where.split(", ")}
        assert page.documented() == listed, process
    series = set().union(*(page.series for page in pages.values()))
    elsewhere = {name for name, where in rows.items() if not set(where.split(", ")) & pages.keys()}
    for file in sorted((ROOT / "charts" / "baton" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                asked_for = set(_NAME.findall(target["expr"]))
                assert asked_for, panel["title"]
                assert asked_for <= series | elsewhere, (file.name, panel["title"])


def kvstore_metrics(cluster: Cluster) -> str:
    found = re.search(r"metrics on port (\d+)", cluster.logs()["kvstore"])
    assert found is not None
    return f"127.0.0.1:{found[1]}"
