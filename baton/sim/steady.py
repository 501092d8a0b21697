"""Sequences that do nothing but decode: how are many of their steps taken at once?

The result is that of taking them one by one. A member is only brought up to date when something is due for
it: it fills a block, which is then shared, and the next one allocated; or it has its last token, or leaves.
"""

from __future__ import annotations

import heapq
from itertools import count

from baton.bench.records import Gaps
from baton.engine.scheduler import Scheduler
from baton.sim.job import Job, SimSequence

_LONGEST_LOG = 4096


class _Member:
    """`at` is the group's step up to which the sequence is current; `leap` the first of the group's leaps
    whose gaps its job does not have yet; `fresh` until its first leap has ended."""

    __slots__ = ("at", "fresh", "job", "leap", "sequence")

    def __init__(self, sequence: SimSequence, at: int) -> None:
        self.sequence = sequence
        self.job: Job = sequence.job
        self.at = at
        self.leap = 0
        self.fresh = True


class Steady:
    """A group of sequences that each get a token per step.

    `context` are the tokens of all members together, `steps` those taken since the worker began. Blocks for
    the steps ahead are set aside when they are planned, so that nobody else can take them meanwhile.
    """

    def __init__(self, scheduler: Scheduler, gaps: Gaps) -> None:
        self.context = 0
        self.steps = 0
        self._scheduler = scheduler
        self._gaps = gaps
        self._members: dict[SimSequence, _Member] = {}
        self._fresh: list[_Member] = []
        self._numbers = count()
        self._ends: list[tuple[int, int, _Member]] = []
        self._fills: list[tuple[int, int, _Member]] = []
        self._spare: list[int] = []
        self._log: list[tuple[float, int]] = []
        self._forgotten = 0
        self._seen_s = 0.0

    def __len__(self) -> int:
        return len(self._members)

    def join(self, sequence: SimSequence) -> None:
        """Take a sequence of which only the next token is to be computed."""
        member = self._members[sequence] = _Member(sequence, self.steps)
        sequence.held_back = False
        tokens = len(sequence.tokens)
        self.context += tokens
        self._fresh.append(member)
        left = sequence.sampling.max_tokens - tokens + sequence.prompt_len
        heapq.heappush(self._ends, (self.steps + left, next(self._numbers), member))
        self._grow(member)

    def plan(self, most: int) -> int:
        """Steps, at most `most`, in which nobody ends and blocks do not run out; at least one."""
        steps = min(most, self._ends[0][0] - self.steps)
        pool = self._scheduler.pool
        while (lacking := self._blocks_for(steps) - len(self._spare)) > pool.available and steps > 1:
            steps //= 2
        if lacking > 0:
            self._spare += pool.allocate(min(lacking, pool.available))
        return steps

    def advance(self, steps: int, began_s: float, first_s: float, ended_s: float) -> list[SimSequence]:
        """Take steps; the members that now have their last token, who leave.

        Times are the clients': the leap began at `began_s`, its first step took `first_s`, and its last
        tokens are there at `ended_s`.
        """
        mean_s = (ended_s - began_s) / steps
        alike = steps * len(self._members)
        self._log.append((mean_s, steps))
        leap = self._forgotten + len(self._log) - 1
        for member in self._fresh:
            job = member.job
            member.fresh, member.leap = False, leap
            if job.last_s != began_s:
                # The first of the steps ends a longer gap, or a shorter one after the first token.
                gap_s = began_s + first_s - job.last_s
                job.gaps.append((gap_s, 1))
                self._gaps.add(gap_s)
                if steps > 1:
                    job.gaps.append((mean_s, steps - 1))
                member.leap += 1
                alike -= 1
        self._fresh.clear()
        if alike:
            self._gaps.add(mean_s, alike)
        self.context += steps * len(self._members)
        self.steps += steps
        self._seen_s = ended_s
        while self._fills and self._fills[0][0] <= self.steps:
            member = heapq.heappop(self._fills)[2]
            if self._members.get(member.sequence) is member:
                self._catch_up(member)
                self._grow(member)
        ended = []
        while self._ends and self._ends[0][0] <= self.steps:
            member = heapq.heappop(self._ends)[2]
            self._leave(member)
            ended.append(member.sequence)
        if len(self._log) > _LONGEST_LOG:
            self._forget()
        return ended

    def dissolve(self) -> None:
        """Let all members go, as they are now."""
        for member in list(self._members.values()):
            self._leave(member)
        self._scheduler.pool.release(self._spare)
        for entries in (self._fresh, self._ends, self._fills, self._spare, self._log):
            entries.clear()
        self._forgotten = 0

    def _blocks_for(self, steps: int) -> int:
        """Blocks that the members need for so many more steps."""
        if not self._fills:
            return 0
        last, size = self.steps + steps, self._fills[0][2].sequence.block_size
        return sum((last - due) // size + 1 for due, _, _ in self._fills if due <= last)

    def _grow(self, member: _Member) -> None:
        """Give a member the block of its next token, if there is one, and look again when it is full."""
        sequence = member.sequence
        self._lay(sequence, len(sequence.tokens))
        size = sequence.block_size
        to_full = size - sequence.computed % size
        heapq.heappush(self._fills, (member.at + to_full, next(self._numbers), member))

    def _lay(self, sequence: SimSequence, tokens: int) -> None:
        lacking = sequence.blocks_for(tokens) - len(sequence.blocks)
        for _ in range(lacking):
            if self._spare:
                sequence.blocks.append(self._spare.pop())
            elif self._scheduler.pool.available:
                sequence.blocks += self._scheduler.pool.allocate(1)

    def _catch_up(self, member: _Member) -> None:
        """Bring a member's sequence up to now."""
        sequence, steps = member.sequence, self.steps - member.at
        if steps:
            member.at = self.steps
            self._lay(sequence, sequence.computed + steps)
            self._scheduler.compute(sequence, steps)
            sequence.extend(steps)
            member.job.output += steps

    def _leave(self, member: _Member) -> None:
        self._catch_up(member)
        sequence, job = member.sequence, member.job
        del self._members[sequence]
        self.context -= len(sequence.tokens)
        if not member.fresh:
            job.gaps += self._log[member.leap - self._forgotten :]
            job.last_s = self._seen_s

    def _forget(self) -> None:
        """Drop what all members have had of the log, or were not there for."""
        for member in self._members.values():
            if member.leap - self._forgotten < len(self._log):
                member.job.gaps += self._log[member.leap - self._forgotten :]
            member.leap = self._forgotten + len(self._log)
        self._forgotten += len(self._log)
        self._log.clear()
