"""The KV really travels over NIXL, is counted to the byte, and a broken registration fails over in sight."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import counter, fresh_prompt, samples, wait_for_workers


@pytest.fixture(scope="module")
def remote(start_cluster: StartCluster) -> Iterator[Cluster]:
    """A cluster whose policy prefills remotely whatever the curves predict."""
    with start_cluster("--policy", "round-robin") as up:
        yield up


def ask(cluster: Cluster, prompt: list[int], **extra: Any) -> httpx.Response:
    body = {"model": "baton-small", "prompt": prompt, "temperature": 0, "ignore_eos": True, **extra}
    response = httpx.post(f"{cluster.base_url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response


def test_bytes_read_are_blocks_times_block_bytes(remote: Cluster) -> None:
    status = remote.status("decode-0")
    metrics, layout = status.metrics_address, status.layout
    for length in (1, 16, 17, 100, 700):
        before = counter(metrics, "baton_kv_transfer_bytes_total")
        answer = ask(remote, fresh_prompt(length), max_tokens=4)
        moved = counter(metrics, "baton_kv_transfer_bytes_total") - before
        assert answer.headers["x-baton-prefill"] == "remote"
        assert moved == -(-length // layout.block_size) * layout.block_bytes
    assert remote.status("decode-0").kv_transfer_bytes == counter(metrics, "baton_kv_transfer_bytes_total")


def test_blocks_the_decode_worker_holds_do_not_travel_again(remote: Cluster) -> None:
    status = remote.status("decode-0")
    metrics, layout = status.metrics_address, status.layout
    prompt = fresh_prompt(10 * layout.block_size)
    ask(remote, prompt, max_tokens=2)
    before = counter(metrics, "baton_kv_transfer_bytes_total")
    longer = ask(remote, prompt + fresh_prompt(20 * layout.block_size), max_tokens=2)
    moved = counter(metrics, "baton_kv_transfer_bytes_total") - before
    assert longer.headers["x-baton-prefill"] == "remote"
    assert moved == 20 * layout.block_bytes


def test_a_request_that_ends_with_its_first_token_moves_no_kv(remote: Cluster) -> None:
    metrics = remote.status("decode-0").metrics_address
    before = counter(metrics, "baton_kv_transfer_bytes_total")
    assert ask(remote, fresh_prompt(200), max_tokens=1).headers["x-baton-prefill"] == "remote"
    assert counter(metrics, "baton_kv_transfer_bytes_total") == before


def test_a_worker_that_cannot_be_read_from_is_passed_over_in_sight(start_cluster: StartCluster) -> None:
    """Its prompts are computed elsewhere, with the same tokens, and every metric on the way says so."""
    with start_cluster("--prefill", "0", "--decode", "1", "--policy", "round-robin") as cluster:
        prompt = fresh_prompt(100)
        alone = ask(cluster, prompt, max_tokens=8, return_token_ids=True)
        assert alone.headers["x-baton-prefill"] == "local"
        with unregistered_prefill(cluster):
            wait_for_workers(cluster, "unregistered")
            again = ask(cluster, prompt, max_tokens=8, return_token_ids=True)
        assert "x-baton-prefill-worker" not in again.headers
        assert again.json()["choices"][0]["token_ids"] == alone.json()["choices"][0]["token_ids"]
        status = cluster.status("decode-0")
        assert counter(status.metrics_address, "baton_handoffs_total", outcome="failed") == 1
        assert status.kv_transfer_bytes == 0
        assert status.pinned_blocks == 0
        router = cluster.own_url.removeprefix("http://")
        for name in ("baton_router_replacements_total", "baton_router_backoffs_total"):
            counts = {
                dict(labels)["reason"]: value
                for (counted, labels), value in samples(router).items()
                if counted == name
            }
            assert counts == {"handoff_failed": 1}


@contextmanager
def unregistered_prefill(cluster: Cluster) -> Iterator[None]:
    script = Path(__file__).with_name("unregistered_prefill.py")
    flags = ("--kvstore", cluster.kvstore_address, "--worker-id", "unregistered", "--kv-blocks", "500")
    worker = subprocess.Popen([sys.executable, script, *flags])
    try:
        yield
    finally:
        worker.terminate()
        worker.wait(60)
