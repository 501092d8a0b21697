"""What the kvstore keeps of one worker: who it is, how busy it is, and the blocks it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.kv.events import Position
from baton.rpc.v1 import kvstore_pb2, worker_pb2
from services.kvstore.holdings import Holdings


@dataclass
class Member:
    """One live worker.

    `position` is how far its events have been taken, None before its first snapshot. A member that was
    read back from the backend is `confirmed` once the worker has joined again.
    """

    worker: kvstore_pb2.Worker
    load: worker_pb2.WorkerLoad
    draining: bool = False
    read_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    confirmed: bool = True
    position: Position | None = None
    holdings: Holdings = field(default_factory=Holdings)

    @property
    def worker_id(self) -> str:
        return self.worker.worker_id

    @property
    def incarnation(self) -> str:
        return self.worker.incarnation

    def change(self, *, gone: bool = False) -> kvstore_pb2.RegistryUpdate.Change:
        """The member as Registry.Watch tells it; a copy, so it may wait in a queue."""
        return kvstore_pb2.RegistryUpdate.Change(
            worker=self.worker,
            load=self.load,
            draining=self.draining,
            gone=gone,
            read_bytes_per_s=self.read_bytes_per_s,
        )
