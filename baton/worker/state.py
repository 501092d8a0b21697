"""What the services of one worker share: who it is, what it serves, and how outputs find their owner."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from baton.engine.engine import Engine
from baton.engine.interfaces import Output
from baton.engine.sequence import Sequence as Choice
from baton.engine.sequence import Work
from baton.kv.events import Event
from baton.kv.hashing import KvLayout
from baton.routing.view import Role
from baton.rpc.v1 import worker_pb2
from baton.transfer.base import Transfer
from baton.worker.convert import context_from, sampling_from
from baton.worker.grammars import Grammars
from baton.worker.metrics import RequestMetrics


class Owner(Protocol):
    """Whom a choice's outputs are for."""

    def deliver(self, outputs: list[Output]) -> None:
        """Take the outputs of one step, on the event loop."""


@dataclass(frozen=True)
class ServedModel:
    """The facts of the model that checking a request needs."""

    name: str
    vocab_size: int
    max_model_len: int


class RouterSession(Protocol):
    """A router's session with this worker, as those see it who take its requests over."""

    def giving(self, key: int) -> AbstractContextManager[Choice]:
        """The request that decodes here under `key`, for one taker at a time.

        Raises:
            HandoffFailed: there is none, or somebody else is taking it.
        """

    def moved(self, key: int) -> bool:
        """The request goes on elsewhere; False if it has ended here in the meantime."""

    def end(self) -> None:
        """End the stream once everything that there is to say has been written."""


@dataclass
class WorkerState:
    """One worker process. `role`, `own_role` (to which it returns from one that it is lent) and `draining`
    change, as `RoleKeeper` and `drain` say; the rest is fixed at start. `routers` are their sessions."""

    worker_id: str
    incarnation: str
    role: Role
    own_role: Role
    model: ServedModel
    layout: KvLayout
    engine: Engine
    transfer: Transfer
    attention_backend: str
    metrics_address: str
    metrics: RequestMetrics
    grammars: Grammars
    draining: bool = False
    sessions: int = 0
    routers: dict[str, RouterSession] = field(default_factory=dict)
    handoffs_serving: int = 0
    handoffs_reading: int = 0
    _keys: itertools.count[int] = field(default_factory=itertools.count)
    _listeners: set[Callable[[], None]] = field(default_factory=set)

    @property
    def takes_decode(self) -> bool:
        return self.role.decodes and not self.draining

    @property
    def takes_prompts(self) -> bool:
        """Whether it prefills for others."""
        return self.role.prefills_for_others and not self.draining

    @contextmanager
    def told(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call `listener` whenever what this worker takes has changed."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def become(self, role: Role) -> None:
        """Take another role; what does not belong to it is handed back or moves away."""
        self.role = role
        self._tell()

    def drain(self) -> None:
        """Take no work any more; what there is moves away."""
        self.draining = True
        self._tell()

    def _tell(self) -> None:
        for listener in list(self._listeners):
            listener()

    def choice(
        self,
        request: worker_pb2.Start | worker_pb2.Begin,
        owner: Owner,
        work: Work,
    ) -> Choice:
        """The sequence a Start or Begin asks for, checked.

        Raises:
            InvalidRequest: it can never run; the message names the field.
        """
        tokens = context_from(
            request.prompt_token_ids,
            request.output_token_ids,
            self.model.vocab_size,
            self.model.max_model_len,
        )
        return Choice(
            key=next(self._keys),
            request_id=request.request_id,
            tokens=tokens,
            prompt_len=len(request.prompt_token_ids),
            sampling=sampling_from(request.sampling, self.model.vocab_size),
            root=self.layout.root(request.cache_salt),
            block_size=self.layout.block_size,
            cache_salt=request.cache_salt,
            traceparent=request.traceparent,
            deadline_s=time.monotonic() + request.timeout_s if request.timeout_s else math.inf,
            work=work,
            owner=owner,
        )

    async def guide(self, choice: Choice) -> None:
        """Give the choice its guide, if it has a grammar; before its first token here is sampled.

        Raises:
            InvalidRequest: the grammar cannot be compiled.
        """
        if choice.sampling.grammar:
            choice.guide = await self.grammars.guide(choice.sampling.grammar, choice.prompt_len)

    async def named(self, ready: worker_pb2.BlocksReady, begin: worker_pb2.Begin) -> worker_pb2.BlocksReady:
        """`ready`, with the digests of its blocks if the reader that sent `begin` wants to compare them."""
        if begin.verify:
            ready.digests.extend(await asyncio.to_thread(self.transfer.digests, list(ready.block_ids)))
        return ready


class Dispatch:
    """The engine's observer: carries what happened from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._index_changed: Callable[[Sequence[Event]], None] = lambda events: None
        self._died: Callable[[BaseException], None] = lambda error: None

    def connect(
        self, index_changed: Callable[[Sequence[Event]], None], died: Callable[[BaseException], None]
    ) -> None:
        """Set who hears of index events (called on the engine's thread) and of the engine's death."""
        self._index_changed, self._died = index_changed, died

    def outputs(self, outputs: list[Output]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def index_changed(self, events: list[Event]) -> None:
        self._index_changed(events)

    def died(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._died, error)

    @staticmethod
    def _deliver(outputs: list[Output]) -> None:
        by_owner: dict[Owner, list[Output]] = defaultdict(list)
        for output in outputs:
            by_owner[output.choice.owner].append(output)  # type: ignore[index]
        for owner, owned in by_owner.items():
            owner.deliver(owned)
