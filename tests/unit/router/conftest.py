"""A router in front of one fake decode worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from baton.text import Tokenizer
from tests.unit.router.fakes import MODEL, FakeWorker, RunningRouter, running_router, running_worker

ANSWER = "The quick brown fox jumps over the lazy dog — naïve café, 日本語 🦊!\n\nIt returns None."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(MODEL)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="session")
def script(tokenizer: Tokenizer) -> list[int]:
    """The tokens of what the fake worker says."""
    return tokenizer.encode(ANSWER, add_special_tokens=False)


@pytest.fixture
async def worker(script: list[int]) -> AsyncIterator[FakeWorker]:
    async with running_worker(FakeWorker("decode-0", script)) as up:
        yield up


@pytest.fixture
async def router(worker: FakeWorker) -> AsyncIterator[RunningRouter]:
    async with running_router(worker) as up:
        yield up


@pytest.fixture
async def http(router: RunningRouter) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=router.base_url, timeout=60) as client:
        yield client


@pytest.fixture
def answer() -> Iterator[str]:
    yield ANSWER
