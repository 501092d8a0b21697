"""Where a request runs: the policy's choice on what the router knows of the cluster this moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from baton.kv.events import TierCounts
from baton.kv.hashing import Chain, KvLayout
from baton.routing import Candidate, ClusterView, Placement, Policy, Request, Role, Unplaceable, WorkerView
from baton.routing.admission import Pace
from baton.routing.correction import Correction
from baton.routing.cost import compute_s
from baton.routing.expected import Coming, Expected
from baton.routing.nominees import EVERYBODY, Nominees
from baton.rpc.v1 import worker_pb2
from services.router.cluster import Cluster, KnownWorker
from services.router.generation import Generation
from services.router.promises import Promise, Promises, Work
from services.router.sessions import SessionPool
from services.router.suspects import Suspects

# The prompt length at which prefill speed is read off the workers' curves, in tokens.
_PROMPT_TOKENS = 512
# Requests that may wait at a decode worker that runs fewer.
_BATCH = 64
# Conversations whose last decode worker is remembered.
_CONVERSATIONS = 65_536

_Conversation = tuple[str, str]

Decision = TypeVar("Decision")


class Hold:
    """A placement and the work it promises to its workers until they report it themselves."""

    def __init__(
        self,
        placement: Placement,
        prompt_tokens: int,
        owner: Promises,
        promises: Sequence[Promise],
        expected: Expected,
        chain: Sequence[bytes],
    ) -> None:
        self.placement = placement
        self.prompt_tokens = prompt_tokens
        self._owner = owner
        self._promises = promises
        self._expected = expected
        self._coming: Coming | None = expected.add(placement.computing.worker_id, chain)

    def release(self) -> None:
        """The prompt is computed, or the workers will never have the work."""
        for promise in self._promises:
            self._owner.release(promise)
        if self._coming is not None:
            self._expected.remove(self._coming)
        self._promises, self._coming = (), None


class Placer:
    """Builds the policy's view of the cluster and asks it."""

    def __init__(self, policy: Policy, cluster: Cluster, sessions: SessionPool) -> None:
        self._policy = policy
        self._cluster = cluster
        self._sessions = sessions
        self._correction = Correction()
        self._promises = Promises(self._correction.apply, cluster.reservations)
        self._expected = Expected()
        self._nominees = Nominees(Random())
        self._conversations: dict[_Conversation, str] = {}
        self.suspects = Suspects()

    def place(self, generation: Generation, output: Sequence[int], avoid: frozenset[str]) -> Hold:
        """Choose workers for a request that has produced `output` so far, away from the workers in `avoid`.

        Raises:
            Unplaceable: no worker can take it now; says why.
        """
        return self._place(generation, output, avoid, self._reachable())

    def _place(
        self,
        generation: Generation,
        output: Sequence[int],
        avoid: frozenset[str],
        known: Sequence[KnownWorker],
    ) -> Hold:
        context = generation.prompt_token_ids
        if output:
            context = [*context, *output]
        chains = _chains(generation.cache_salt, context, known)
        request = self._request(generation, len(context), chains, avoid)
        placement = self._decide(request, known)
        if request.session:
            self._remember(_conversation(generation), placement.decode.worker_id)
        chain: Sequence[bytes] = ()
        if placement.compute_tokens > request.block_size:
            chain = chains[self._cluster.workers[placement.computing.worker_id].layout]
        promises = self._promise(placement, request)
        return Hold(placement, request.prompt_tokens, self._promises, promises, self._expected, chain)

    def place_decode(self, generation: Generation, output: Sequence[int], avoid: frozenset[str]) -> Hold:
        """Choose a decode worker for a request whose KV is to be moved there, away from those in `avoid`.

        Raises:
            Unplaceable: no worker can take it now; says why.
        """
        decoders = [worker for worker in self._reachable() if worker.view.role.decodes]
        return self._place(generation, output, avoid, decoders)

    def explain(self, generation: Generation) -> tuple[Request, list[Candidate]]:
        """The request as the policy sees it, and what it would choose, then every other placement.

        Raises:
            Unplaceable: no worker can take it now; says why.
        """
        known = self._reachable()
        context = generation.prompt_token_ids
        chains = _chains(generation.cache_salt, context, known)
        request = self._request(generation, len(context), chains, frozenset())
        view = self._view(known)
        return request, self._away_from_suspects(request, lambda asked: self._policy.explain(asked, view))

    def is_live(self, worker_id: str, incarnation: str) -> bool:
        """Whether the registry has this incarnation of the worker."""
        known = self._cluster.workers.get(worker_id)
        return known is not None and known.view.incarnation == incarnation

    def check_ready(self) -> None:
        """
        Raises:
            Unplaceable: not even the smallest request could be placed now; says why.
        """
        smallest = Request(prompt_tokens=1, blocks=1, block_size=1, block_bytes=1)
        self._policy.choose(smallest, ClusterView([worker.view for worker in self._reachable()]))

    def workers(self) -> list[tuple[KnownWorker, WorkerView, bool]]:
        """Every live worker, as it is now, and whether it can be used now; for whoever shows the cluster."""
        reachable = {worker.view.worker_id for worker in self._reachable()}
        return [
            (known, self._promises.view(known.view), worker_id in reachable)
            for worker_id, known in sorted(self._cluster.workers.items())
        ]

    def kv_bytes_per_token(self, worker_id: str) -> int:
        """Bytes of KV per token on a worker; 0 when it is gone."""
        known = self._cluster.workers.get(worker_id)
        return known.layout.block_bytes // known.layout.block_size if known is not None else 0

    def longest_context(self) -> int | None:
        """Tokens of prompt and output that some decode worker can hold; None while there is none."""
        return max(
            (
                min(worker.max_model_len, worker.view.total_blocks * worker.layout.block_size)
                for worker in self._reachable()
                if worker.view.role.decodes
            ),
            default=None,
        )

    def has_room(self, ahead_s: float) -> bool:
        """Whether some worker would begin a prompt within `ahead_s`, and some decode worker has not
        a whole batch waiting yet. Also when there is no worker: waiting would not help."""
        decoders, prefillers = self._takers()
        if not decoders:
            return True
        return any(worker.backlog_s <= ahead_s for worker in prefillers) and any(
            worker.waiting < max(_BATCH, worker.running) for worker in decoders
        )

    def pace(self, ahead_s: float) -> Pace:
        """How fast waiting requests will start and end, as the workers' curves have it."""
        decoders, prefillers = self._takers()
        if not decoders:
            return Pace()
        prompt_s = sum(worker.prefill_curve.seconds(_PROMPT_TOKENS) for worker in prefillers)
        step_s = sum(worker.decode_curve.seconds(max(1, worker.running)) for worker in decoders)
        return Pace(
            prefill_s=prompt_s / len(prefillers) / _PROMPT_TOKENS,
            prefillers=len(prefillers),
            step_s=step_s / len(decoders),
            backlog_s=max(0.0, min(worker.backlog_s for worker in prefillers) - ahead_s),
        )

    def on_load(self, worker_id: str, load: worker_pb2.WorkerLoad) -> None:
        """A worker reported what it has to do."""
        self._promises.on_load(worker_id, load)

    def on_prefill(self, hold: Hold, report: worker_pb2.PrefillReport) -> None:
        """A worker computed the prompt of `hold`: learn how far its prefill curve is off."""
        placement = hold.placement
        remote = report.kind == worker_pb2.PrefillReport.REMOTE
        worker = placement.computing if remote else placement.decode
        predicted_s = compute_s(worker, hold.prompt_tokens, report.cached_tokens)
        measured_curve_s = predicted_s / worker.prefill_curve.scale
        self._correction.learn(worker.worker_id, measured_curve_s, report.prefill_s)
        self._promises.outdated(worker.worker_id)
        self.suspects.worked(worker.worker_id)
        self.suspects.worked(placement.decode.worker_id)

    def forget(self, worker_id: str) -> None:
        """The worker is gone."""
        self._correction.forget(worker_id)
        self._promises.forget(worker_id)
        self._expected.forget(worker_id)
        self.suspects.worked(worker_id)

    def _decide(self, request: Request, known: Sequence[KnownWorker]) -> Placement:
        """The policy's choice among those that are likely it, or among all where it is none of them."""
        if self._policy.weighs and len(known) > EVERYBODY:
            views = self._view(self._likely(request, known))
            self._nominees.keep(views.workers)
            try:
                return self._away_from_suspects(request, lambda asked: self._policy.place(asked, views))
            except Unplaceable:
                pass
        everybody = self._view(known)
        return self._away_from_suspects(request, lambda asked: self._policy.place(asked, everybody))

    def _likely(self, request: Request, known: Sequence[KnownWorker]) -> list[KnownWorker]:
        by_name = {worker.view.worker_id: worker for worker in known}
        roles: dict[bool, list[str]] = {True: [], False: []}
        for worker_id, worker in by_name.items():
            if not worker.view.draining:
                roles[worker.view.role.decodes].append(worker_id)
        named = self._nominees.choose(roles, (request.held, request.expected), request.session_worker)
        return [by_name[worker_id] for worker_id in named if worker_id in by_name]

    def _away_from_suspects(self, request: Request, decide: Callable[[Request], Decision]) -> Decision:
        """What is decided for the request without the suspects, or with them where it cannot be."""
        suspects = self.suspects.avoided()
        if suspects:
            try:
                return decide(replace(request, avoid=request.avoid | suspects))
            except Unplaceable:
                pass
        return decide(request)

    def _reachable(self) -> list[KnownWorker]:
        """Workers that can be used now: decode workers need a session."""
        return [
            worker
            for worker_id, worker in self._cluster.workers.items()
            if not worker.view.role.decodes or self._sessions.connected(worker_id) is not None
        ]

    def _view(self, known: Sequence[KnownWorker]) -> ClusterView:
        views = [self._promises.view(worker.view) for worker in known]
        if draining := self._sessions.draining:  # faster than the registry, and says nothing of prefill work
            views = [
                replace(view, draining=True) if view.worker_id in draining and view.role.decodes else view
                for view in views
            ]
        return ClusterView(views)

    def _takers(self) -> tuple[list[WorkerView], list[WorkerView]]:
        """The workers that take requests to decode and those that take prompts: without dedicated ones,
        the same."""
        views = [self._promises.view(worker.view) for worker in self._reachable()]
        decoders = [view for view in views if view.role.decodes and not view.draining]
        prefillers = [view for view in views if view.role is Role.PREFILL and not view.draining]
        return decoders, prefillers or decoders

    def _request(
        self,
        generation: Generation,
        prompt_tokens: int,
        chains: Mapping[KvLayout, Chain],
        avoid: frozenset[str],
    ) -> Request:
        tiers: dict[str, TierCounts] = {}
        expected: dict[str, int] = {}
        for chain in chains.values():
            tiers.update(self._cluster.index.lookup_tiers(chain))
            expected.update(self._expected.lookup(chain))
        # Workers of one model differ in block size only while they are replaced by others; the
        # smallest then overstates what the rest hold, which costs time and no correctness.
        block_size = min((layout.block_size for layout in chains), default=1)
        total = len(generation.prompt_token_ids) + generation.sampling.max_tokens
        return Request(
            prompt_tokens=prompt_tokens,
            blocks=-(-total // block_size),
            block_size=block_size,
            block_bytes=max((layout.block_bytes for layout in chains), default=1),
            held={worker_id: counts.total for worker_id, counts in tiers.items()},
            tiers=tiers,
            expected=expected,
            avoid=avoid,
            slo=generation.caller.slo,
            session=generation.caller.session,
            session_worker=self._conversations.get(_conversation(generation)),
        )

    def _remember(self, conversation: _Conversation, worker_id: str) -> None:
        self._conversations.pop(conversation, None)
        self._conversations[conversation] = worker_id
        if len(self._conversations) > _CONVERSATIONS:
            del self._conversations[next(iter(self._conversations))]

    def _promise(self, placement: Placement, request: Request) -> list[Promise]:
        decode, computing = placement.decode.worker_id, placement.computing.worker_id
        return [
            self._promises.make(
                worker_id,
                Work(
                    requests=1 if worker_id == decode else 0,
                    queued_tokens=placement.compute_tokens if worker_id == computing else 0,
                    blocks=max(0, request.prompt_blocks - request.held.get(worker_id, 0)),
                ),
            )
            for worker_id in {decode, computing}
        ]


def _conversation(generation: Generation) -> _Conversation:
    """Tenants may use the same session ids, and must not learn of each other by them."""
    return generation.cache_salt, generation.caller.session


def _chains(salt: str, context: Sequence[int], known: Sequence[KnownWorker]) -> dict[KvLayout, Chain]:
    """The names of the context's blocks, in each of the layouts that workers have."""
    layouts = {worker.layout for worker in known}
    return {layout: Chain(layout.root(salt), context, layout.block_size) for layout in layouts}
