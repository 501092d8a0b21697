"""A task that has seen a TaskGroup fail is told of its time-outs, and ends when it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from baton.old_timeouts import Timeout


def usual(seconds: float) -> asyncio.Timeout:
    return asyncio.timeout(seconds)


def mended(seconds: float) -> asyncio.Timeout:
    return Timeout(asyncio.get_running_loop().time() + seconds)


TIMEOUTS = pytest.mark.parametrize("timeout", [usual, mended])


async def fail() -> None:
    await asyncio.sleep(0)
    raise OSError


@TIMEOUTS
async def test_after_a_failed_group_a_time_out_is_an_error(
    timeout: Callable[[float], asyncio.Timeout],
) -> None:
    for _ in range(3):
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fail())
        with pytest.raises(TimeoutError):
            async with timeout(0.01):
                await asyncio.Event().wait()


@TIMEOUTS
async def test_who_is_cancelled_within_a_time_out_ends(timeout: Callable[[float], asyncio.Timeout]) -> None:
    begun = asyncio.Event()

    async def wait() -> None:
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fail())
        async with timeout(60):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
