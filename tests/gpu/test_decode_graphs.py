"""Recorded decode steps compute what the same steps compute when every kernel is launched; overlapped too."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
from reference_models import VOCAB, variant, write_reference

from baton.attention import flash, flashinfer
from baton.attention.base import AttentionBackend, AttentionBatch
from baton.attention.select import create_backend, preferred_block_size
from baton.config import AttentionName
from baton.device import device_of
from baton.engine.engine import Engine, Stop
from baton.engine.graphs import DecodeGraphs
from baton.engine.interfaces import Output
from baton.engine.runner import Runner
from baton.engine.scheduler import Limits, Scheduler
from baton.engine.sequence import Sequence
from baton.kv.events import Event
from baton.kv.pool import BlockPool
from baton.models.base import Model
from baton.models.loader import load_model
from baton.sampling import Sampling

DEVICE = torch.device("cuda", 0)
BLOCKS = 160
USABLE = {module.__name__: module.supports(DEVICE, torch.bfloat16, ()) for module in (flash, flashinfer)}
BACKENDS = [name.rpartition(".")[2] for name, usable in USABLE.items() if usable]


def load(name: str, folder: Path) -> Model:
    changes = {"head_dim": 64}
    chosen = variant(name)
    write_reference(type(chosen)(chosen.name, chosen.config, {**chosen.changes, **changes}), folder)
    return load_model(folder, str(DEVICE), "bfloat16", 900)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load("llama", tmp_path_factory.mktemp("llama"))


def backend(model: Model, name: AttentionName) -> AttentionBackend:
    size = preferred_block_size(DEVICE, model.dtype, model.attention_specs, name)
    return create_backend(DEVICE, model.dtype, model.attention_specs, BLOCKS, size, model.fingerprint, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_recorded_step_is_the_step(model: Model, name: AttentionName) -> None:
    attention = backend(model, name)
    size = attention.cache.layout.block_size
    graphs = DecodeGraphs.record(model, attention, device_of(DEVICE), 8)
    assert graphs is not None
    assert not attention.cache.storage.any()
    draw = random.Random(0)
    contexts = [1, size, size + 1, 2 * size - 1, 700, 3, 90, 899]
    width = 900 // size + 1
    tables = [list(range(at * width, (at + 1) * width)) for at in range(len(contexts))]
    attention.cache.storage.copy_(torch.randn(attention.cache.storage.shape))
    pristine = attention.cache.storage.clone()
    for count in (8, 7, 5, 4, 3, 2, 1):
        batch = AttentionBatch([1] * count, contexts[:count], tables[:count])
        tokens = torch.tensor([draw.randrange(VOCAB) for _ in range(count)], device=DEVICE)
        positions = torch.tensor(contexts[:count], device=DEVICE) - 1
        attention.cache.storage.copy_(pristine)
        with torch.inference_mode():
            recorded = graphs.run(tokens, positions, batch).clone()
        written = attention.cache.storage.clone()
        attention.cache.storage.copy_(pristine)
        attention.begin(batch)
        eager = model.logits(model.forward(tokens, positions, attention))
        # Nothing else was written, and the same was computed up to the rounding of another kernel.
        changed = (written != pristine).flatten(1).any(-1), (attention.cache.storage != pristine)
        assert torch.equal(changed[0], changed[1].flatten(1).any(-1))
        scale = float(eager.abs().max())
        assert float((recorded - eager).abs().max()) < 0.02 * scale


def test_a_model_that_waits_for_the_device_runs_without_graphs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load("mixtral", tmp_path)
    attention = backend(model, "auto")
    assert DecodeGraphs.record(model, attention, device_of(DEVICE), 4) is None
    assert "decode runs without graphs" in caplog.text
    attention.begin(AttentionBatch([2], [2], [[0]]))
    tokens = torch.tensor([3, 4], device=DEVICE)
    hidden = model.forward(tokens, torch.arange(2, device=DEVICE), attention)
    assert bool(hidden.isfinite().all())


class Gatherer:
    """Every choice's tokens, and when all have ended."""

    def __init__(self, expected: int) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.errors: list[str] = []
        self.expected = expected
        self.done = threading.Event()

    def outputs(self, outputs: list[Output]) -> None:
        for one in outputs:
            if one.sampled is not None:
                self.tokens.setdefault(one.choice.key, []).append(one.sampled.token_id)
            if one.error:
                self.errors.append(one.error)
            if one.finish_reason is not None or one.error:
                self.expected -= 1
        if not self.expected:
            self.done.set()

    def index_changed(self, events: list[Event]) -> None: ...

    def died(self, error: BaseException) -> None:
        self.errors.append(repr(error))
        self.done.set()


def is_the_references_choice(model: Model, name: AttentionName, context: list[int], start: int) -> None:
    """Every token from `start` on is the likeliest, or as good as: bfloat16 decides between near equals."""
    attention = backend(model, name)
    count = len(context) - 1
    attention.begin(AttentionBatch([count], [count], [list(range(BLOCKS))]))
    tokens = torch.tensor(context[:-1], device=DEVICE)
    logits = model.logits(model.forward(tokens, torch.arange(count, device=DEVICE), attention))
    rows, chosen = logits[start - 1 :], torch.tensor(context[start:], device=DEVICE)
    missing = rows.amax(-1) - rows.gather(1, chosen[:, None])[:, 0]
    assert float(missing.max()) < 0.05 * float(rows.abs().max())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlapped"])
@pytest.mark.parametrize("record", [False, True], ids=["launched", "recorded"])
def test_an_engine_answers_as_the_model_says(
    model: Model, name: AttentionName, overlap: bool, record: bool
) -> None:
    attention = backend(model, name)
    size = attention.cache.layout.block_size
    graphs = DecodeGraphs.record(model, attention, device_of(DEVICE), 6) if record else None
    draw = random.Random(1)
    prompts = [[draw.randrange(VOCAB) for _ in range(draw.randrange(1, 300))] for _ in range(20)]
    gatherer, pool = Gatherer(len(prompts)), BlockPool(BLOCKS)
    engine = Engine(
        Scheduler(pool, Limits(128, 6, 100)),
        Runner(model, attention, DEVICE, graphs),
        gatherer,
        Stop(frozenset(), 900),
        overlap=overlap,
    )
    for key, prompt in enumerate(prompts):
        engine.submit(
            Sequence(
                key=key,
                request_id="",
                tokens=list(prompt),
                prompt_len=len(prompt),
                sampling=Sampling(max_tokens=10 + 3 * key, temperature=0.0),
                root=bytes(16),
                block_size=size,
            )
        )
    engine.start()
    assert gatherer.done.wait(120)
    engine.stop()
    assert gatherer.errors == []
    assert pool.pinned == 0
    for key, prompt in enumerate(prompts):
        assert len(gatherer.tokens[key]) == 10 + 3 * key
        is_the_references_choice(model, name, prompt + gatherer.tokens[key], len(prompt))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_decode_step_is_begun_without_waiting_for_the_device(model: Model, name: AttentionName) -> None:
    attention = backend(model, name)
    runner = Runner(model, attention, DEVICE, DecodeGraphs.record(model, attention, device_of(DEVICE), 4))
    scheduler = Scheduler(BlockPool(BLOCKS), Limits(64, 4, 10))
    for key in range(3):
        scheduler.submit(
            Sequence(
                key=key,
                request_id="",
                tokens=[5, 6, 7],
                prompt_len=3,
                sampling=Sampling(max_tokens=9, temperature=0.8, top_p=0.9, top_k=40, seed=key),
                root=bytes(16),
                block_size=attention.cache.layout.block_size,
            )
        )
    first = runner.begin(scheduler.schedule())
    first.sample()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = first.then(scheduler.schedule())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first.results()
    second.sample()
    assert all(result.sampled is not None for result in second.results())
