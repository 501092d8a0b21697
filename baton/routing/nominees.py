"""Whom does a router weigh for a request when there are too many workers to weigh all?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import nlargest, nsmallest
from random import Random

from baton.routing.choice import requests_on
from baton.routing.view import WorkerView

EVERYBODY = 32
"""Workers of a role up to which all of them are weighed."""

_DRAWN = 4
_KEPT = 2
_HOLDERS = 4


class Nominees:
    """Of each role all workers up to `everybody`; of more, a few that one of the best is likely among.

    These are who holds most of the prompt or will, who had the conversation last, and in the place of the
    least loaded of all the least loaded of those weighed before and some drawn at random: a few draws with a
    memory of the best balance nearly as well (Mitzenmacher, Prabhakar, Shah: Load Balancing with Memory, FOCS
    2002), cost the same in a cluster of any size, and keep routers that know the same apart.
    """

    def __init__(self, rng: Random, everybody: int = EVERYBODY) -> None:
        self._rng = rng
        self._everybody = everybody
        self._kept: dict[bool, list[str]] = {}

    def choose(
        self,
        roles: Mapping[bool, Sequence[str]],
        held: Iterable[Mapping[str, int]],
        session_worker: str | None,
    ) -> list[str]:
        """The ids of the workers to weigh, each once.

        Args:
            roles: the workers that take new work, by whether they decode.
            held: how many leading blocks of the prompt workers hold, or will hold.
            session_worker: who decoded the conversation's last request.
        """
        chosen: dict[str, None] = {}
        for decodes, names in roles.items():
            if len(names) <= self._everybody:
                chosen.update(dict.fromkeys(names))
                continue
            chosen.update(dict.fromkeys(self._kept.get(decodes, ())))
            for _ in range(_DRAWN):
                chosen[names[int(self._rng.random() * len(names))]] = None
        for counts in held:
            if len(counts) <= _HOLDERS:
                chosen.update(dict.fromkeys(counts))
            else:
                chosen.update(dict.fromkeys(nlargest(_HOLDERS, counts, key=counts.__getitem__)))
        if session_worker is not None:
            chosen[session_worker] = None
        return list(chosen)

    def keep(self, weighed: Sequence[WorkerView]) -> None:
        """Remember the least loaded of the workers that `choose` named, as they were seen."""
        for decodes in (True, False):
            views = [view for view in weighed if view.role.decodes is decodes]
            if len(views) > _KEPT:
                self._kept[decodes] = [view.worker_id for view in nsmallest(_KEPT, views, key=_load)]


def _load(worker: WorkerView) -> tuple[float, int]:
    return worker.backlog_s, requests_on(worker)
