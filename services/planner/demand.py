"""What is asked of the routers, from the pages that Prometheus reads too."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from baton.addresses import join, split
from baton.planning.demand import Arrived, Ended

log = logging.getLogger(__name__)

_TIMEOUT_S = 3.0
_MOST_BYTES = 4 << 20

_ARRIVED = "baton_router_arrived_choices_total"
_ARRIVED_TOKENS = "baton_router_arrived_prompt_tokens_total"
_ENDED = "vllm:request_prompt_tokens_count"
_ENDED_PROMPTS = "vllm:request_prompt_tokens_sum"
_ENDED_CACHED = "baton_router_cached_prompt_tokens_total"
_ENDED_OUTPUTS = "vllm:request_generation_tokens_sum"
_TPOT = "vllm:request_time_per_output_token_seconds_sum"
_TPOTS = "vllm:request_time_per_output_token_seconds_count"
_WAITING = "vllm:num_requests_waiting"
_BESIDE = "baton_router_prefills_beside"
_COUNTS = frozenset(
    {_ARRIVED, _ARRIVED_TOKENS, _ENDED, _ENDED_PROMPTS, _ENDED_CACHED, _ENDED_OUTPUTS, _TPOT, _TPOTS}
)

Page = Mapping[str, float]
"""Values by name, summed over labels."""


def read_page(text: str) -> Page:
    """The values of a metrics page that tell of demand."""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _COUNTS or sample.name in (_WAITING, _BESIDE):
                found[sample.name] += sample.value
    return found


@dataclass(frozen=True)
class Demanded:
    """What happened at all routers since the last look.

    `prefills_beside`: do they have decode workers compute prompts, too?
    """

    arrived: Arrived
    ended: Ended
    waiting: int
    routers: int
    prefills_beside: bool


class Tally:
    """Turns counters that grow into what happened in between, router by router."""

    def __init__(self) -> None:
        self._before: dict[str, Page] = {}

    def take(self, pages: Mapping[str, Page]) -> Demanded:
        """What happened since the last pages. A router that is new began from what it now says; one whose
        counters fell is a new process, and counted from 0; one that is missing says nothing."""
        since: defaultdict[str, float] = defaultdict(float)
        for router, page in pages.items():
            before = self._before.get(router, page)
            if page.get(_ARRIVED, 0.0) < before.get(_ARRIVED, 0.0):
                before = {}
            for name in _COUNTS:
                since[name] += max(0.0, page.get(name, 0.0) - before.get(name, 0.0))
        self._before = dict(pages) or self._before
        outputs = int(since[_ENDED_OUTPUTS])
        tpot_s = since[_TPOT] / since[_TPOTS] if since[_TPOTS] else 0.0
        return Demanded(
            Arrived(int(since[_ARRIVED]), int(since[_ARRIVED_TOKENS])),
            Ended(
                requests=int(since[_ENDED]),
                prompt_tokens=int(since[_ENDED_PROMPTS]),
                cached_tokens=int(since[_ENDED_CACHED]),
                output_tokens=outputs,
                decode_s=tpot_s * outputs,
            ),
            waiting=round(sum(page.get(_WAITING, 0.0) for page in pages.values())),
            routers=len(pages),
            prefills_beside=any(page.get(_BESIDE, 0.0) for page in pages.values()),
        )


async def _whole(response: aiohttp.ClientResponse) -> str:
    """A page to its end, in however many pieces it comes: half of one would make counters fall.

    Raises:
        ValueError: it is too long, or no text.
    """
    page = bytearray()
    async for piece in response.content.iter_any():
        page += piece
        if len(page) > _MOST_BYTES:
            raise ValueError(f"its /metrics has more than {_MOST_BYTES} bytes")
    return page.decode()


class Routers:
    """The routers behind `address` (host:port of their metrics): all that the name stands for."""

    def __init__(self, address: str, session: aiohttp.ClientSession) -> None:
        self._address = address
        self._host, self._port = split(address)
        self._session = session
        self._tally = Tally()

    async def look(self) -> Demanded:
        """What happened since the last look; routers that do not answer in time are left out."""
        try:
            addresses = await self._addresses()
        except OSError as error:
            log.warning("no router at %s: %s", self._address, error)
            return self._tally.take({})
        pages = await asyncio.gather(*map(self._page, addresses))
        return self._tally.take(
            {address: page for address, page in zip(addresses, pages, strict=True) if page is not None}
        )

    async def _addresses(self) -> list[str]:
        found = await asyncio.get_running_loop().getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
        return sorted({join(str(where[0]), self._port) for *_, where in found})

    async def _page(self, address: str) -> Page | None:
        url = f"http://{address}/metrics"
        try:
            async with asyncio.timeout(_TIMEOUT_S), self._session.get(url) as response:
                response.raise_for_status()
                return read_page(await _whole(response))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            log.warning("router at %s does not say what it does: %s", address, error or type(error).__name__)
            return None
