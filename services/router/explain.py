"""GET and POST /debug/route: where a request would go now, and why; nothing is placed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

import msgspec

from baton.errors import InvalidRequest
from baton.routing import Candidate, Request, WorkerView
from services.router.frontend import Frontend
from services.router.generation import Generation
from services.router.http import Exchange
from services.router.openai_api import OpenAiApi


class RouteExplainer:
    """Answers with the request as placement sees it, the queues, and every candidate with its terms."""

    def __init__(self, frontend: Frontend, api: OpenAiApi, policy: str) -> None:
        self._frontend = frontend
        self._api = api
        self._policy = policy

    async def get(self, exchange: Exchange) -> None:
        """For the query's `prompt`, completed with default settings."""
        prompts = parse_qs(exchange.query).get("prompt", [])
        if len(prompts) != 1:
            raise InvalidRequest("prompt: give one in the query, or POST a request body", field="prompt")
        await self._answer(exchange, msgspec.json.encode({"prompt": prompts[0]}))

    async def post(self, exchange: Exchange) -> None:
        """For the body of a chat (it has `messages`) or a completion."""
        await self._answer(exchange, await exchange.json_body())

    async def _answer(self, exchange: Exchange, body: bytes) -> None:
        try:
            is_chat = isinstance(parsed := msgspec.json.decode(body), dict) and "messages" in parsed
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            is_chat = False  # what is wrong with it is better said by the endpoint's own parser
        if is_chat:
            generations = (await self._api.read_chat(body, exchange)).generations
        else:
            generations = (await self._api.read_completion(body, exchange)).generations
        await exchange.json(200, self._shape(generations[0]))

    def _shape(self, generation: Generation) -> dict[str, Any]:
        request, candidates = self._frontend.placer.explain(generation)
        return {
            "policy": self._policy,
            "prompt_tokens": request.prompt_tokens,
            "prompt_blocks": request.prompt_blocks,
            "block_size": request.block_size,
            "block_bytes": request.block_bytes,
            "slo": request.slo,
            "session": request.session or None,
            "session_worker": request.session_worker,
            "held_blocks": dict(request.held),
            "backed_off": sorted(self._frontend.placer.suspects.avoided()),
            "waiting": self._frontend.door.waiting(),
            "candidates": [
                {"chosen": at == 0, **_candidate(candidate, request)}
                for at, candidate in enumerate(candidates)
            ],
        }


def _candidate(candidate: Candidate, request: Request) -> dict[str, Any]:
    placement = candidate.placement
    pull = placement.pull
    return {
        "decode": _worker(placement.decode, request),
        "prefill": _worker(placement.prefill, request) if placement.prefill is not None else None,
        "pull": {"worker": pull.worker.worker_id, "blocks": pull.blocks} if pull is not None else None,
        "reason": placement.reason,
        "compute_tokens": placement.compute_tokens,
        "first_token_s": placement.terms.first_token_s,
        "total_s": candidate.total_s,
        "terms": asdict(placement.terms),
    }


def _worker(worker: WorkerView, request: Request) -> dict[str, Any]:
    held = request.held_by_tier(worker.worker_id)
    return {
        "worker": worker.worker_id,
        "held_blocks": {"device": held.device, "host": held.host, "disk": held.disk},
        "running": worker.running,
        "waiting": worker.waiting,
        "queued_tokens": worker.queued_tokens,
        "free_blocks": worker.free_blocks,
    }
