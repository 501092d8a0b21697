"""What goes to a worker: together what gathered together, in order, nothing twice and nothing lost."""

from __future__ import annotations

import asyncio

from baton.rpc.v1 import worker_pb2
from services.router.outbox import MESSAGE_TOKENS, Outbox


def start(key: int, tokens: int = 1) -> worker_pb2.Start:
    return worker_pb2.Start(key=key, prompt_token_ids=[7] * tokens)


def said(message: worker_pb2.SessionRequest) -> tuple[list[int], list[int]]:
    return [start.key for start in message.starts], list(message.cancelled_keys)


async def test_what_has_gathered_is_one_message() -> None:
    outbox = Outbox()
    waiting = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    for key in (1, 2, 3):
        outbox.start(start(key))
    outbox.cancel(2)
    assert said(await waiting) == ([1, 2, 3], [2])
    outbox.cancel(1)
    assert said(await outbox.take()) == ([], [1])
    again = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()


async def test_a_message_has_a_bound_and_no_cancel_overtakes_its_start() -> None:
    outbox = Outbox()
    for key in (1, 2, 3):
        outbox.start(start(key, MESSAGE_TOKENS))
    outbox.cancel(3)
    assert [said(await outbox.take()) for _ in range(3)] == [([1], []), ([2], []), ([3], [3])]


def test_a_worker_that_does_not_read_fills_it() -> None:
    outbox = Outbox()
    key = 0
    while not outbox.full:
        outbox.start(start(key := key + 1))
    assert key == 8192
