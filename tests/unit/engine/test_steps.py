"""A worker's real runner answers the same whether steps overlap and run as graphs or not, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from paged_reference import flashinfer, varlen_attn

from baton.attention.base import AttentionBackend, AttentionBatch
from baton.attention.flash import FlashAttention
from baton.attention.flashinfer import FlashInferAttention
from baton.attention.paged import PagedKvCache
from baton.attention.select import create_backend
from baton.config import ModelSettings
from baton.device import HostDevice
from baton.engine.engine import Engine, Stop
from baton.engine.graphs import DecodeGraphs, ladder
from baton.engine.interfaces import Output
from baton.engine.runner import Runner
from baton.engine.scheduler import Limits, Scheduler
from baton.engine.sequence import Sequence as Choice
from baton.kv.hashing import KvLayout
from baton.kv.pool import BlockPool
from baton.models.base import Model
from baton.models.loader import load_model
from baton.sampling import Sampling
from tests.unit.engine.fake_engine import Collector

BLOCK = 8
BLOCKS = 40
CPU = torch.device("cpu")
DEVICE = HostDevice(CPU)

REQUESTS = [
    Sampling(max_tokens=9, temperature=0.0, logprobs=3),
    Sampling(max_tokens=12, seed=1, top_p=0.9, frequency_penalty=0.7, prompt_logprobs=2),
    Sampling(max_tokens=20, seed=2, top_k=20, repetition_penalty=1.3, min_tokens=6),
    Sampling(max_tokens=1, seed=3, logprobs=0),
    Sampling(max_tokens=17, seed=4, presence_penalty=1.0, logit_bias={7: 4.0, 99: -3.0}),
    Sampling(max_tokens=30, temperature=0.0, ignore_eos=True),
    Sampling(max_tokens=25, seed=6, temperature=2.0, stop_token_ids=tuple(range(0, 4096, 9))),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(Path(ModelSettings().model), "cpu", "float32", 256)


def pages(model: Model) -> PagedKvCache:
    spec = model.attention_specs[0]
    shape = (BLOCKS, len(model.attention_specs), 2, BLOCK, spec.kv_heads, spec.head_dim)
    layout = KvLayout(model.fingerprint, "float32", BLOCK, 0, "layer,kv,token,head,dim")
    return PagedKvCache(layout, shape, torch.float32, CPU)


def native(model: Model) -> AttentionBackend:
    return create_backend(CPU, model.dtype, model.attention_specs, BLOCKS, BLOCK, model.fingerprint)


def flash(model: Model) -> AttentionBackend:
    return FlashAttention(model.attention_specs, pages(model), DEVICE, varlen_attn)


def flash_infer(model: Model) -> AttentionBackend:
    return FlashInferAttention(model.attention_specs, pages(model), DEVICE, flashinfer)


class Gatherer(Collector):
    """Keeps all that is said of each choice."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[int, list[object]] = {}

    def outputs(self, outputs: list[Output]) -> None:
        for one in outputs:
            what = (one.sampled, one.finish_reason, one.stopped_by_token_id, one.prompt_logprobs, one.error)
            self.said.setdefault(one.choice.key, []).append(what)
        super().outputs(outputs)


def one(key: int, prompt: list[int], sampling: Sampling) -> Choice:
    return Choice(
        key=key,
        request_id="",
        tokens=list(prompt),
        prompt_len=len(prompt),
        sampling=sampling,
        root=bytes(16),
        block_size=BLOCK,
    )


def answers(
    model: Model, attention: AttentionBackend, graphs: DecodeGraphs | None, overlap: bool
) -> dict[int, list[object]]:
    """What is said of each of `REQUESTS`, with too few blocks for all of them at once."""
    pool, gatherer = BlockPool(BLOCKS // 2), Gatherer()
    runner = Runner(model, attention, CPU, graphs)
    stop = Stop(frozenset(model.config.eos_token_ids), 70)
    engine = Engine(Scheduler(pool, Limits(24, 6, 100)), runner, gatherer, stop, overlap=overlap)
    for key, sampling in enumerate(REQUESTS):
        prompt = [(key * 31 + at * at) % 4000 + 3 for at in range(5 + 9 * key)]
        engine.submit(one(key, prompt, sampling))
    engine.start()
    try:
        gatherer.wait(lambda: len(gatherer.finished) == len(REQUESTS))
    finally:
        engine.stop()
    assert not gatherer.errors
    assert pool.pinned == 0
    return gatherer.said


@pytest.mark.parametrize("make", [native, flash, flash_infer])
def test_answers_are_the_same_in_turn_overlapped_and_from_graphs(
    model: Model, make: Callable[[Model], AttentionBackend]
) -> None:
    expected = answers(model, make(model), None, overlap=False)
    assert answers(model, make(model), None, overlap=True) == expected
    attention = make(model)
    if attention.fixed_rows(1, 1) is None:
        return  # what the CPU's own backends do between steps cannot be recorded
    graphs = DecodeGraphs.record(model, attention, DEVICE, 6)
    assert graphs is not None
    assert answers(model, attention, graphs, overlap=False) == expected
    assert answers(model, attention, graphs, overlap=True) == expected


@pytest.mark.parametrize("make", [flash, flash_infer])
def test_paged_backends_agree_with_the_cpus_own(
    model: Model, make: Callable[[Model], AttentionBackend]
) -> None:
    tokens = torch.arange(3, 40)
    lens, tables = [20, 17], [[5, 9, 2, 30], [7, 1, 11]]
    hidden = []
    for attention in (native(model), make(model)):
        attention.begin(AttentionBatch(lens, lens, tables))
        positions = torch.cat([torch.arange(count) for count in lens])
        hidden.append(model.forward(tokens, positions, attention))
    assert torch.allclose(*hidden, atol=1e-4)


@pytest.mark.parametrize("make", [flash, flash_infer])
def test_rows_that_a_batch_leaves_over_write_outside_the_pool(
    model: Model, make: Callable[[Model], AttentionBackend]
) -> None:
    attention = make(model)
    graphs = DecodeGraphs.record(model, attention, DEVICE, 8)
    assert graphs is not None
    storage = attention.cache.storage
    assert not storage.any()
    graphs.run(torch.tensor([5, 6, 7]), torch.tensor([0, 9, 3]), decode([1, 10, 4], [[3], [8, 0], [2]]))
    written = storage.flatten(1).any(-1).nonzero().flatten().tolist()
    assert written == [0, 2, 3]
    tokens_written = storage[0, 0, 0].flatten(1).any(-1).nonzero().flatten().tolist()
    assert tokens_written == [1]


def test_graphs_take_one_token_each_of_no_more_sequences_than_they_were_made_for(model: Model) -> None:
    graphs = DecodeGraphs.record(model, flash(model), DEVICE, 2)
    assert graphs is not None
    assert graphs.take(decode([3, 4], [[0], [1]]))
    assert not graphs.take(decode([3, 4, 5], [[0], [1], [2]]))
    assert not graphs.take(AttentionBatch([1, 2], [3, 4], [[0], [1]]))


def decode(contexts: Sequence[int], tables: Sequence[Sequence[int]]) -> AttentionBatch:
    return AttentionBatch([1] * len(contexts), contexts, tables)


def test_a_model_that_cannot_be_recorded_runs_without_graphs(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    class Waiting(HostDevice):
        def graph(self, compute: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")

    assert DecodeGraphs.record(model, flash(model), Waiting(CPU), 4) is None
    assert DecodeGraphs.record(model, native(model), DEVICE, 4) is None
    assert "without graphs: called a synchronizing CUDA operation" in caplog.text
    assert "attention backend native has no buffers that stay" in caplog.text


def test_the_ladder_of_batch_sizes() -> None:
    assert ladder(1) == [1]
    assert ladder(5) == [1, 2, 4, 5]
    assert ladder(32) == [1, 2, 4, 8, 16, 24, 32]
    assert ladder(33)[-2:] == [32, 33]


def test_nothing_is_preempted_before_the_running_step_ends() -> None:
    scheduler = Scheduler(BlockPool(4), Limits(64, 8, 100))
    for key in range(2):
        scheduler.submit(one(key, [key] * 2 * BLOCK, Sampling(max_tokens=BLOCK)))
    step = scheduler.schedule()
    assert len(step) == 2
    assert scheduler.schedule() == []  # either would need a block more
    for item in step:
        scheduler.advance(item)
        item.sequence.append(1)
    assert scheduler.preemptions == 0
    assert len(scheduler.schedule()) == 1
    assert scheduler.preemptions == 1
