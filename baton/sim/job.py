"""One simulated request on its way, and the sequence that a scheduler sees of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import nan
from typing import TYPE_CHECKING, cast

from baton.bench.records import Gaps, RequestRecord, mooncake_tbt_s
from baton.engine.sequence import Sequence, Work
from baton.routing import Placement
from baton.routing.admission import Ticket
from baton.routing.attempts import Attempts
from baton.sampling import Sampling
from baton.sim.workload import SimRequest

if TYPE_CHECKING:
    from baton.sim.handoff import Handoff

_ROOT = bytes(16)


@dataclass(eq=False, slots=True)
class Job:
    """A request from its arrival to its end, across placements.

    `attempt` counts placements, those that found no worker too: what was set going for an earlier one is
    ignored. There were `placed_output` tokens at its last placement. Times are the client's, `gaps` those
    between its tokens, as (seconds, how often).
    """

    number: int
    request: SimRequest
    router: int
    attempts: Attempts
    attempt: int = 0
    placement: Placement | None = None
    output: int = 0
    placed_output: int = 0
    first_s: float = nan
    last_s: float = nan
    cached_tokens: int = 0
    gaps: list[tuple[float, int]] = field(default_factory=list)
    ticket: Ticket | None = None
    ended: bool = False

    @property
    def context_tokens(self) -> int:
        return self.request.prompt_tokens + self.output

    def take_token(self, seen_s: float, gaps: Gaps) -> None:
        """Its client gets another token; the gap before it, unless it is the first, is one of all `gaps`."""
        if self.output:
            gap_s = seen_s - self.last_s
            self.gaps.append((gap_s, 1))
            gaps.add(gap_s)
        else:
            self.first_s = seen_s
        self.output += 1
        self.last_s = seen_s

    def record(self, error: str = "") -> RequestRecord:
        """What came of it."""
        return RequestRecord(
            self.request.arrival_s,
            self.request.arrival_s,
            self.first_s,
            self.last_s,
            self.request.prompt_tokens,
            self.output,
            cached_tokens=self.cached_tokens,
            tbt_s=mooncake_tbt_s(self.gaps),
            error=error,
        )


@lru_cache(4096)
def _sampling(max_tokens: int) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


class SimSequence(Sequence):
    """A sequence whose tokens are only counted, and whose blocks are named by the workload."""

    def __init__(
        self, job: Job, block_tokens: int, work: Work = Work.GENERATE, handoff: Handoff | None = None
    ) -> None:
        super().__init__(
            key=job.number,
            request_id="",
            tokens=_counted(job.context_tokens),
            prompt_len=job.request.prompt_tokens,
            sampling=_sampling(job.request.output_tokens),
            root=_ROOT,
            block_size=block_tokens,
            work=work,
        )
        self.job = job
        self.handoff = handoff

    def chain(self, full_blocks: int) -> list[bytes]:
        """See `Sequence.chain`."""
        known = self._chain
        if len(known) < full_blocks:
            known += self.job.request.chain.span(len(known), full_blocks)
        return known[:full_blocks]

    def extend(self, tokens: int) -> None:
        """Count tokens that were generated."""
        self.tokens = _counted(len(self.tokens) + tokens)

    @property
    def finished(self) -> bool:
        """Whether the last token was generated."""
        return len(self.tokens) - self.prompt_len >= self.sampling.max_tokens


def _counted(tokens: int) -> list[int]:
    """So many tokens. Schedulers ask for nothing but how many there are."""
    return cast("list[int]", range(tokens))
