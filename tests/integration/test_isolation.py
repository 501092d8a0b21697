"""Requests with different cache salts share no blocks, no hit counts and no index entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import grpc
import httpx
import pytest

from baton.kv.hashing import extend_chain
from baton.rpc.v1 import kvstore_pb2, kvstore_pb2_grpc
from baton.transfer.wire import layout_from_proto
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import BLOCK, counter, fresh_prompt, until

WORKER = "hybrid-0"


@pytest.fixture(scope="module")
def alone(start_cluster: StartCluster) -> Iterator[Cluster]:
    with start_cluster("--hybrid", "1", "--kv-blocks", "400") as up:
        yield up


def ask(cluster: Cluster, prompt: list[int], salt: str) -> Mapping[str, str]:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    if salt:
        body["cache_salt"] = salt
    response = httpx.post(f"{cluster.base_url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == int(
        response.headers["x-baton-cached-tokens"]
    )
    return response.headers


def indexed(cluster: Cluster) -> set[bytes]:
    """Every block id in the kvstore's index."""
    found: set[bytes] = set()
    with grpc.insecure_channel(cluster.kvstore_address) as channel:
        index = kvstore_pb2_grpc.PrefixIndexStub(channel)
        for update in index.Subscribe(kvstore_pb2.SubscribeRequest(), timeout=60):
            for event in update.events.events:
                found.update(event.block_ids[at : at + 16] for at in range(0, len(event.block_ids), 16))
            if update.snapshot_done:
                return found
    raise AssertionError("the kvstore ended the stream before its snapshot was complete")


def test_salts_share_neither_blocks_nor_hits_nor_index_entries(alone: Cluster) -> None:
    layout = layout_from_proto(alone.status(WORKER).layout)
    metrics = alone.status(WORKER).metrics_address
    prompt = fresh_prompt(20 * BLOCK + 1)
    seen: set[bytes] = indexed(alone)
    for number, salt in enumerate(("red", "blue", "")):
        cached_before = counter(metrics, "baton_kv_cached_blocks")
        computed_before = counter(metrics, "baton_engine_computed_tokens_total")
        first = ask(alone, prompt, salt)
        assert first["x-baton-cached-tokens"] == "0"
        assert first["x-baton-prefill"] == "local"
        assert counter(metrics, "baton_kv_cached_blocks") == cached_before + 20
        assert counter(metrics, "baton_engine_computed_tokens_total") == computed_before + len(prompt) + 1

        chain = set(extend_chain(layout.root(salt), prompt, BLOCK))
        assert not chain & seen
        until(lambda chain=chain: chain <= indexed(alone), lambda: indexed(alone))
        seen = indexed(alone)
        assert len(seen) == 20 * (number + 1)

        again = ask(alone, prompt, salt)
        assert again["x-baton-cached-tokens"] == str(20 * BLOCK)
        assert counter(metrics, "baton_kv_cached_blocks") == cached_before + 20
