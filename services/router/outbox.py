"""What a worker is told next, gathered into as few messages as its session can take."""

from __future__ import annotations

import asyncio
from collections import deque

from baton.rpc.v1 import worker_pb2

MESSAGE_TOKENS = 65_536
"""Prompt tokens after which a message ends: far below what gRPC takes, and enough to fill any step."""

# Starts and cancels for a worker that has stopped reading; then its session is as good as broken.
_MOST = 8192


class Outbox:
    """Starts and cancels on their way to the worker. What gathers while a message is sent goes together in
    the next: a message costs more than all else that is done for a short request."""

    def __init__(self) -> None:
        self._starts: deque[worker_pb2.Start] = deque()
        self._cancelled: list[int] = []
        self._filled = asyncio.Event()

    @property
    def full(self) -> bool:
        return len(self._starts) + len(self._cancelled) >= _MOST

    def start(self, start: worker_pb2.Start) -> None:
        self._starts.append(start)
        self._filled.set()

    def cancel(self, key: int) -> None:
        self._cancelled.append(key)
        self._filled.set()

    async def take(self) -> worker_pb2.SessionRequest:
        """The next message; waits for something to say."""
        await self._filled.wait()
        starts, tokens = [], 0
        while self._starts and tokens < MESSAGE_TOKENS:
            starts.append(self._starts.popleft())
            tokens += len(starts[-1].prompt_token_ids)
        message = worker_pb2.SessionRequest(starts=starts)
        if not self._starts:  # no cancel may overtake its start
            message.cancelled_keys.extend(self._cancelled)
            self._cancelled.clear()
            self._filled.clear()
        return message
