"""A router that is served while a test asks from another thread, in front of a worker that is none."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from baton.text import Tokenizer
from tests.tool_models import model_with_tools
from tests.unit.router.fakes import FakeWorker, RunningRouter, running_router, running_worker

_START_S = 30.0
_PATIENCE_S = 0.2
_SAYS = """Why: <tool_call>
{"name": "a", "arguments": {"b": [1, "c"]}}
</tool_call> and <tool_call>{"""


@contextmanager
def served_router() -> Iterator[RunningRouter]:
    """The router, on an event loop of its own."""
    started = threading.Event()
    routers: list[RunningRouter] = []
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        worker = FakeWorker("decode-0", script)
        async with (
            running_worker(worker),
            running_router(worker, model=model, head_timeout_s=_PATIENCE_S) as up,
        ):
            routers.append(up)
            loops.append((asyncio.get_running_loop(), stop))
            started.set()
            await stop.wait()

    patience = pytest.MonkeyPatch()
    patience.setattr("services.router.http._BODY_TIMEOUT_S", _PATIENCE_S)
    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="router")
    with tempfile.TemporaryDirectory() as folder:
        model = model_with_tools(Path(folder) / "model", "hermes")
        tokenizer = Tokenizer.load(model)
        assert tokenizer is not None
        script = tokenizer.encode(_SAYS, add_special_tokens=False)
        thread.start()
        try:
            assert started.wait(_START_S), "the router did not start"
            yield routers[0]
        finally:
            for loop, stop in loops:
                loop.call_soon_threadsafe(stop.set)
            thread.join()
            patience.undo()
