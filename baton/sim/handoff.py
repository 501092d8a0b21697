"""How KV comes to a simulated worker: from the one that computes the prompt, or from one that has it cached.

The messages, and who holds which blocks meanwhile, are those of `baton/worker/handoff_*.py` and `pull.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from baton.engine.reservations import Pinned, Reservation
from baton.engine.sequence import Work, longest_reusable
from baton.errors import BatonError
from baton.sim.job import Job, SimSequence
from baton.sim.network import Flow
from baton.sim.worker import SimWorker, World


class Handoff:
    """A prompt computed by one worker and decoded by another, from Start to Released.

    Args:
        pull_from: a third worker that has `pull_blocks` of the prompt for the one that computes.
        failed: called when the handoff cannot go on, with the reason; it has then let everything go.
    """

    def __init__(
        self,
        world: World,
        job: Job,
        decode: SimWorker,
        prefill: SimWorker,
        pull_from: SimWorker | None,
        pull_blocks: int,
        failed: Callable[[str], None],
    ) -> None:
        self.job = job
        self._world = world
        self._decode = decode
        self._prefill = prefill
        self._pull_from = pull_from
        self._pull_blocks = pull_blocks
        self._failed = failed
        self._block_tokens = world.cluster.block_tokens
        self._hop_s = world.cluster.network_s
        self._over = False
        self._submitted = False
        self._unread = 0
        self._last = False
        self._granted = False
        self._flow: Flow | None = None
        self._pull: Pull | None = None
        self._reservation: Reservation | None = None
        decode.handoffs[self] = prefill.handoffs[self] = None
        self.sequence = SimSequence(job, self._block_tokens, Work.PREFILL, self)
        self._total = self.sequence.blocks_for(len(self.sequence.tokens))

    def start(self) -> None:
        """The decode worker has the request: it pins what it holds and asks the other one."""
        if self._over:
            return
        tokens = self.sequence.tokens
        chain = self.sequence.chain(longest_reusable(tokens, self._block_tokens))
        self._reservation = self._decode.reservations.pin_prefix(chain)
        self.sequence.announced = self._reservation.held
        self._world.clock.after(self._hop_s, self._begin)

    def abort(self) -> None:
        """End it: both sides let go what they hold."""
        if self._over:
            return
        self._over = True
        for worker in (self._decode, self._prefill):
            worker.handoffs.pop(self, None)
        if self._flow is not None:
            self._world.network.stop(self._flow)
        if self._pull is not None:
            self._pull.abort()
        if self._prefill.alive and self._submitted:
            self._prefill.cancel(self.sequence)
        if self._decode.alive and self._reservation is not None:
            self._decode.reservations.drop(self._reservation)
            self._decode.freed()

    # ---- at the prefill worker ----------------------------------------------------------------

    def _begin(self) -> None:
        if self._over:
            return
        if self._pull_from is None:
            self._submit()
        else:
            self._pull = Pull(
                self._world, self._prefill, self._pull_from, self.sequence, self._pull_blocks, self._submit
            )
            self._pull.start()

    def _submit(self) -> None:
        if self._over:
            return
        self._submitted = True
        try:
            self._prefill.submit(self.sequence)
        except BatonError as error:
            self._submitted = False
            self._give_up(error.openai_type)

    def announce(self, *, final: bool) -> None:
        """Name blocks that are complete and were not yet named; none when the first token is the last."""
        sequence = self.sequence
        if self.job.output + (not final) >= self.job.request.output_tokens:
            return
        complete = len(sequence.blocks) if final else sequence.shared
        fresh = max(0, complete - sequence.announced)
        sequence.announced += fresh
        if fresh or final:
            self._world.clock.after(self._hop_s, self._ready, fresh, final)

    def sampled(self) -> None:
        """The first token is there: it goes to the client by way of the decode worker."""
        job = self.job
        job.take_token(self._world.clock.now_s + 3 * self._hop_s, self._world.gaps)
        if job.output >= job.request.output_tokens:
            self.abort()
            del self._decode.jobs[job]
            self._world.finished(job)
        else:
            self.announce(final=True)

    # ---- at the decode worker -----------------------------------------------------------------

    def _ready(self, blocks: int, final: bool) -> None:
        reservation = self._reservation
        if self._over or reservation is None:
            return
        self._unread += blocks
        self._last = self._last or final
        if reservation.granted is None and blocks:
            self._decode.reservations.reserve(reservation, self._total).add_done_callback(self._grant)
            self._decode.note()
        elif self._granted or final:
            self._read()

    def _grant(self, granted: Future[None]) -> None:
        if self._over:
            return
        if granted.exception() is not None:
            # Called from within the reservations: let them finish first.
            self._world.clock.after(0.0, self._give_up, "handoff_failed")
            return
        self._granted = True
        self._world.clock.after(0.0, self._read)

    def _read(self) -> None:
        """Read what was named, one range at a time; all read, say so."""
        if self._over or self._flow is not None:
            return
        if self._unread:
            if not self._granted:
                return
            size = self._unread * self._world.cluster.block_bytes
            self._unread = 0
            self._flow = self._world.network.send(self._prefill.card, self._decode.card, size, self._arrived)
        elif self._last:
            self._last = False
            self._world.clock.after(self._hop_s, self._done)

    def _arrived(self) -> None:
        self._flow = None
        self._read()

    def _done(self) -> None:
        """Done has come to the prefill worker: it lets go and answers Released."""
        if self._over:
            return
        del self._prefill.handoffs[self]
        self._prefill.cancel(self.sequence)
        self._world.clock.after(self._hop_s, self._released)

    def _released(self) -> None:
        decode, reservation = self._decode, self._reservation
        if self._over or reservation is None:
            return
        self._over = True
        del decode.handoffs[self]
        sequence = SimSequence(self.job, self._block_tokens)
        sequence.started = True
        decode.reservations.hand_over(reservation, len(reservation.blocks))
        decode.adopt(sequence, reservation.blocks, reservation.held)

    def _give_up(self, reason: str) -> None:
        if not self._over:
            self.abort()
            self._failed(reason)


class Pull:
    """A prefix read from a worker that has it cached; `then` is called however it ends."""

    def __init__(
        self,
        world: World,
        reader: SimWorker,
        source: SimWorker,
        sequence: SimSequence,
        blocks: int,
        then: Callable[[], None],
    ) -> None:
        self._world = world
        self._reader = reader
        self._source = source
        self._sequence = sequence
        self._blocks = min(blocks, longest_reusable(sequence.tokens, sequence.block_size))
        self._then = then
        self._mine: Pinned | None = None
        self._theirs: Pinned | None = None
        self._flow: Flow | None = None
        self._over = False

    def start(self) -> None:
        """Pin what the reader has, and ask the source for the rest."""
        self._reader.pulls[self] = self._source.pulls[self] = None
        self._mine = self._reader.reservations.pin(self._sequence.chain(self._blocks))
        if not self._source.alive or self._mine.held >= self._blocks:
            self._end()
        else:
            self._world.clock.after(self._world.cluster.network_s, self._lend)

    def abort(self) -> None:
        """Stop without a call to `then`."""
        self._then = lambda: None
        self._end()

    def source_died(self) -> None:
        """Go on without."""
        self._end()

    def _lend(self) -> None:
        if self._over or self._mine is None:
            return
        self._theirs = self._source.reservations.pin(self._sequence.chain(self._blocks))
        if self._theirs.held <= self._mine.held:
            self._world.clock.after(self._world.cluster.network_s, self._end)
        else:
            self._world.clock.after(self._world.cluster.network_s, self._read)

    def _read(self) -> None:
        if self._over or self._mine is None or self._theirs is None:
            return
        count = self._theirs.held - self._mine.held
        if not self._reader.reservations.extend(self._mine, count):
            self._end()
            return
        size = count * self._world.cluster.block_bytes
        self._flow = self._world.network.send(self._source.card, self._reader.card, size, self._arrived)

    def _arrived(self) -> None:
        self._flow = None
        self._world.clock.after(2 * self._world.cluster.network_s, self._released)

    def _released(self) -> None:
        if self._over or self._mine is None or self._theirs is None:
            return
        self._theirs.copied = True
        self._sequence.pulled = range(self._mine.held, len(self._mine.blocks))
        self._reader.reservations.share(self._mine, self._sequence.chain(len(self._mine.blocks)))
        self._reader.publish()
        self._end()

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        if self._flow is not None:
            self._world.network.stop(self._flow)
        for worker, pinned in ((self._reader, self._mine), (self._source, self._theirs)):
            worker.pulls.pop(self, None)
            if worker.alive and pinned is not None:
                worker.reservations.unpin(pinned)
        if self._reader.alive:
            self._then()
            self._reader.freed()
        if self._source.alive:
            self._source.freed()
