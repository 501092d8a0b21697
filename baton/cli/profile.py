"""`baton profile`: how long do prefill and decode steps of a model take on this machine?"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from baton.cli.files import file_to_write
from baton.cli.options import settings_options
from baton.cli.run import WORKER_EXTRA, worker_extra_missing
from baton.config import Settings
from baton.profile import DecodePoint, PrefillPoint, Profile

CONTEXTS = (64, 512, 2048)
_BUDGET_S = 20.0


@click.command(short_help="Measure step times of a model on this machine.")
@settings_options("model", "engine")
@file_to_write("--out", "file for the curves, as JSON [none]")
def profile(settings: Settings, out: Path | None) -> None:
    """Measure step times of --model: prefill against tokens, decode against requests and context."""
    if worker_extra_missing():
        raise click.ClickException(WORKER_EXTRA)
    measured = _measure(settings)
    table = Table(title=f"{measured.model} in {measured.dtype}, {measured.threads} threads")
    for column in ("step", "requests", "tokens each", "ms", "tokens/s"):
        table.add_column(column, justify="right")
    for point in measured.prefill:
        rate = point.tokens / point.seconds
        table.add_row("prefill", "1", str(point.tokens), f"{point.seconds * 1e3:.2f}", f"{rate:.0f}")
    for step in measured.decode:
        rate = step.batch / step.seconds
        table.add_row(
            "decode", str(step.batch), str(step.context), f"{step.seconds * 1e3:.2f}", f"{rate:.0f}"
        )
    Console().print(table)
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(measured)) + b"\n")


def _measure(settings: Settings) -> Profile:
    """Load the model as a worker does, and have a worker's engine run it. Points that the KV pool cannot hold
    are left out."""
    # Here, not above: they load torch, which the base install does not have.
    import torch

    from baton.engine.engine import Engine, Stop
    from baton.engine.profiling import Profiler, StepClock
    from baton.worker.host import DECODE_SIZES, PREFILL_SIZES, load
    from baton.worker.startup import Startup

    loaded = load(settings, Startup())
    config, block_size = loaded.model.config, loaded.attention.layout.block_size
    on_gpu = settings.model.device == "cuda"
    clock = StepClock()
    engine = Engine(
        loaded.scheduler, loaded.runner, clock, Stop(frozenset(), config.max_model_len), overlap=on_gpu
    )
    engine.start()
    try:
        profiler = Profiler(engine, clock, block_size, config.vocab_size)
        longest = min(config.max_model_len - 1, loaded.scheduler.pool.total_blocks * block_size - 1)
        prompts = [size for size in PREFILL_SIZES if size < longest] + [longest]
        prefill = profiler.prefill(prompts, _BUDGET_S)
        batches = [size for size in DECODE_SIZES if size <= settings.engine.max_batch_requests]
        decode = [
            DecodePoint(batch, context, seconds)
            for context in CONTEXTS
            if 2 * context <= config.max_model_len
            for batch, seconds in profiler.decode(batches, context, _BUDGET_S).items()
        ]
    finally:
        engine.stop()
    device = torch.cuda.get_device_name(settings.model.gpu) if on_gpu else "cpu"
    count = len(loaded.model.shards)
    return Profile(
        model=settings.model.served_model_name or Path(settings.model.model).name,
        device=device if count == 1 else f"{count} x {device}",
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions={"baton": version("baton-serve"), "torch": version("torch")},
        prefill=[PrefillPoint(tokens, seconds) for tokens, seconds in prefill.items()],
        decode=decode,
    )
