"""What a placement policy answers: who computes, who decodes, what is read from where, and why."""

from __future__ import annotations

from dataclasses import dataclass

from baton.routing.view import Slo, WorkerView

WAITING = {"interactive": 1.0, "batch": 0.1}
"""What a second in a queue counts by the request's class: a batch request hardly minds it and seeks
what takes least from others."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a placement is predicted to cost, in seconds.

    Of the worker that computes the prompt: `queue_s` before it begins, `tier_s` reading blocks from its
    host and disk tiers, `pull_s` reading blocks from another worker, `compute_s` computing the rest. Of
    the worker that decodes: `transfer_s` reading from the prefill worker, `interference_s` that requests
    decoding there lose to a prefill beside them, `decode_s` that this request and those lose by sharing
    steps. `storage_s` is what it will take to have again what the prompt's blocks push out of the pools.
    `affinity_s` is negative where the conversation would stay in place.
    """

    queue_s: float = 0.0
    tier_s: float = 0.0
    pull_s: float = 0.0
    compute_s: float = 0.0
    transfer_s: float = 0.0
    interference_s: float = 0.0
    decode_s: float = 0.0
    storage_s: float = 0.0
    affinity_s: float = 0.0

    @property
    def first_token_s(self) -> float:
        """Predicted seconds until the first token is computed."""
        return self.queue_s + self.tier_s + self.pull_s + self.compute_s

    def total_s(self, slo: Slo) -> float:
        """All of it, the queue weighed by `WAITING`."""
        queue_s = WAITING[slo] * self.queue_s
        own_s = self.tier_s + self.pull_s + self.compute_s + self.transfer_s + self.decode_s
        return queue_s + own_s + self.interference_s + self.storage_s + self.affinity_s


@dataclass(frozen=True, slots=True)
class PullSource:
    """A worker whose cached prefix is to be read instead of computed: its first `blocks` blocks."""

    worker: WorkerView
    blocks: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Who decodes, and who prefills: `prefill` is None when the decode worker does it itself.

    `pull` is for whoever computes the prompt; `compute_tokens` are those of it that are left to compute.
    """

    decode: WorkerView
    prefill: WorkerView | None
    pull: PullSource | None
    compute_tokens: int
    terms: Terms
    reason: str

    @property
    def computing(self) -> WorkerView:
        """The worker that computes the prompt."""
        return self.prefill or self.decode

    @property
    def pair(self) -> tuple[str, str]:
        """The ids of the workers that compute and decode."""
        return self.computing.worker_id, self.decode.worker_id


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement and the total of its terms, which `prefix` makes least and baselines ignore."""

    placement: Placement
    total_s: float
