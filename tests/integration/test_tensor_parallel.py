"""Workers on different numbers of devices are one cluster: KV moves between them, and answers are right."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import torch
import transformers

from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.cluster import Cluster
from tests.conftest import StartCluster
from tests.integration.cluster_state import BLOCK, counter, nothing_is_held, pulls, until, wait_for_workers
from tests.integration.live_streams import streams
from tests.integration.worker_session import generate, pull_from
from tests.unit.models.reference_models import VOCAB, variant, write_reference

NARROW, WIDE = "hybrid-0", "wide"
DIRECTIONS = [(NARROW, WIDE), (WIDE, NARROW)]
TOKENS = 48
LONG = 1500
# float32 sums in another order; a wrong block changes logits by more than a hundred times as much.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Mixed:
    """A cluster of a worker on one device and a worker on two, and the model that both serve."""

    cluster: Cluster
    reference: transformers.PreTrainedModel

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Each token is what the reference finds likeliest after those before it, up to rounding."""
        with torch.inference_mode():
            logits = self.reference(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        short = logits.max(-1).values - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert float(short.max()) < ROUNDING

    def held(self) -> None:
        until(lambda: nothing_is_held(self.cluster), "nothing is held")


@contextmanager
def wide_worker(cluster: Cluster, folder: Path) -> Iterator[None]:
    flags = {
        "--model": str(folder),
        "--served-model-name": "served",
        "--kvstore": cluster.kvstore_address,
        "--worker-id": WIDE,
        "--role": "hybrid",
        "--tensor-parallel": "2",
        "--max-batch-tokens": "128",
        "--kv-blocks": "800",
        "--kv-host-bytes": "20000000",
        "--threads": "1",
    }
    command = [sys.executable, "-m", "services.decode", *(word for pair in flags.items() for word in pair)]
    worker = subprocess.Popen([*command, "--kv-verify"])
    try:
        wait_for_workers(cluster, WIDE)
        yield
    finally:
        worker.terminate()
        worker.wait(60)


@pytest.fixture(scope="module")
def mixed(start_cluster: StartCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    folder = tmp_path_factory.mktemp("llama")
    llama = variant("llama")
    long = replace(llama, changes={**llama.changes, "max_position_embeddings": 2048})
    reference = write_reference(long, folder).eval()
    flags = ("--hybrid", "1", "--served-model-name", "served", "--max-batch-tokens", "128")
    with (
        start_cluster(*flags, "--kv-blocks", "800", model=folder) as cluster,
        wide_worker(cluster, folder),
    ):
        yield Mixed(cluster, reference)


def fresh(length: int, seed: str) -> list[int]:
    draw = random.Random(f"{seed} {length}")
    return [draw.randrange(VOCAB) for _ in range(length)]


def test_both_name_blocks_alike(mixed: Mixed) -> None:
    assert mixed.cluster.status(NARROW).layout == mixed.cluster.status(WIDE).layout
    address = mixed.cluster.status(WIDE).metrics_address
    assert counter(address, "baton_worker_info", tensor_parallel="2") == 1


@pytest.mark.parametrize(("prefills", "decodes"), DIRECTIONS)
def test_what_one_prefills_the_other_decodes(mixed: Mixed, prefills: str, decodes: str) -> None:
    for length in (1, 16, 17, 100, 300, 600):
        prompt = fresh(length, prefills)
        tokens, report = generate(mixed.cluster, decodes, prompt, TOKENS, prefill_worker=prefills)
        assert report.kind == worker_pb2.PrefillReport.REMOTE
        mixed.check(prompt, tokens)
    mixed.held()


@pytest.mark.parametrize(("holder", "puller"), DIRECTIONS)
def test_a_prefix_is_pulled_by_the_other(mixed: Mixed, holder: str, puller: str) -> None:
    prompt = fresh(20 * BLOCK + 5, f"held by {holder}")
    generate(mixed.cluster, holder, prompt, 1)
    before = pulls(mixed.cluster, puller, "pulled")
    tokens, report = generate(
        mixed.cluster, puller, prompt, TOKENS, pull=pull_from(mixed.cluster, holder, 20)
    )
    assert (report.cached_tokens, report.pulled_tokens) == (20 * BLOCK, 20 * BLOCK)
    assert pulls(mixed.cluster, puller, "pulled") == before + 1
    mixed.check(prompt, tokens)
    mixed.held()


@pytest.mark.parametrize(("leaves", "takes"), DIRECTIONS)
def test_streams_move_to_the_other_with_their_kv(mixed: Mixed, leaves: str, takes: str) -> None:
    asked = [
        {"prompt": fresh(length, leaves), "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
        for length in (5, 40, 90, 170, 33, 64)
    ]
    cluster = mixed.cluster
    before: list[tuple[float, float]] = []
    address = cluster.status(takes).metrics_address

    def taken() -> tuple[float, float]:
        """Requests that the other has taken over, and prompt tokens that it has computed."""
        return (
            counter(address, "baton_moves_total", outcome="moved"),
            counter(address, "baton_prompt_tokens_total", source="computed"),
        )

    async def leave() -> None:
        before.append(await asyncio.to_thread(taken))
        await become(cluster, takes, worker_pb2.ROLE_HYBRID)
        await become(cluster, leaves, worker_pb2.ROLE_PREFILL)

    asyncio.run(become(cluster, takes, worker_pb2.ROLE_PREFILL))
    answered = asyncio.run(streams(cluster, asked, leave))
    asyncio.run(become(cluster, leaves, worker_pb2.ROLE_HYBRID))
    ((moved, computed),) = before
    assert taken()[0] > moved
    assert taken()[1] == computed
    for body, streamed in zip(asked, answered, strict=True):
        mixed.check(body["prompt"], streamed.choices[0].tokens)
    mixed.held()


async def become(cluster: Cluster, worker_id: str, role: worker_pb2.Role.ValueType) -> None:
    async with grpc.aio.insecure_channel(cluster.workers()[worker_id]) as channel:
        await worker_pb2_grpc.WorkerAdminStub(channel).SetRole(
            worker_pb2.SetRoleRequest(role=role), timeout=30
        )


def test_what_left_the_pool_comes_back_from_host_memory(mixed: Mixed) -> None:
    prompts = [fresh(900, f"tier {number}") for number in range(16)]
    for prompt in prompts:
        generate(mixed.cluster, WIDE, prompt, 1)
    tokens, report = generate(mixed.cluster, WIDE, prompts[0], TOKENS)
    assert report.cached_tokens == len(prompts[0]) // BLOCK * BLOCK
    address = mixed.cluster.status(WIDE).metrics_address
    assert counter(address, "baton_kv_tier_fetched_blocks_total", tier="host") > 0
    mixed.check(prompts[0], tokens)
