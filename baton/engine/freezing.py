"""Which decoding sequences stop, so that another worker can take them over where they stand."""

from __future__ import annotations

from concurrent.futures import Future

from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence, State


class Freezer:
    """Stops sequences between steps and lets them go on.

    Pure state; the caller's lock guards it. A sequence that has stopped is held as finished prefill work is:
    it keeps its blocks, and `thaw` must follow, however its move ends.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._asked: dict[Sequence, Future[bool]] = {}

    def freeze(self, sequence: Sequence) -> Future[bool]:
        """See `Engine.freeze`."""
        asked = self._asked[sequence] = Future()
        asked.set_running_or_notify_cancel()  # whoever asked may be gone when it is settled
        sequence.frozen = True
        return asked

    def settle(self) -> None:
        """Stop what was asked to and is in no step any more. Call between steps, with everything that ended
        steps brought already reported."""
        for sequence, asked in list(self._asked.items()):
            if sequence.state is State.RUNNING and sequence.in_flight:
                continue
            decodes = sequence.state is State.RUNNING and sequence.decodes
            if decodes:
                self._scheduler.hold(sequence)
            else:
                sequence.frozen = False
            del self._asked[sequence]
            asked.set_result(decodes)

    def thaw(self, sequence: Sequence) -> None:
        """Let a sequence go on; it ends instead if it was cancelled meanwhile."""
        asked = self._asked.pop(sequence, None)
        if asked is not None:
            asked.set_result(False)
        was_frozen, sequence.frozen = sequence.frozen, False
        if not was_frozen or sequence.state is not State.HOLDING:
            return
        if sequence.cancelled:
            self._scheduler.release(sequence)
        else:
            self._scheduler.resume(sequence)
