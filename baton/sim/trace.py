"""Requests of a recorded workload whose prompts are known by the ids of their blocks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.kv.hashing import BLOCK_ID_BYTES
from baton.kv.pool import BlockPool

BLOCK_TOKENS = 512
"""Tokens per block id in Mooncake's traces."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `chain` are the ids of its full prompt blocks; `session` names its conversation."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    chain: tuple[bytes, ...]
    session: str


def read_trace(lines: Iterable[str]) -> list[TraceRequest]:
    """The rows of a Mooncake trace (JSON lines), in order of arrival.

    Requests with the same time stamp, which some traces round to seconds, are spread evenly up to the
    next one. The traces name no conversations: a prompt that goes on from all full blocks of an earlier
    one, more than one, belongs to that one's.

    Raises:
        ValueError, KeyError: a line is not such a row.
    """
    rows = sorted((json.loads(line) for line in lines if line.strip()), key=lambda row: int(row["timestamp"]))
    stamps = sorted({int(row["timestamp"]) for row in rows})
    following = dict(zip(stamps, [*stamps[1:], stamps[-1] + 1 if stamps else 0], strict=True))
    together = Counter(int(row["timestamp"]) for row in rows)
    before: Counter[int] = Counter()
    ends: dict[bytes, str] = {}
    requests = []
    for number, row in enumerate(rows):
        stamp = int(row["timestamp"])
        share = before[stamp] / together[stamp]
        before[stamp] += 1
        prompt_tokens = max(1, int(row["input_length"]))
        ids = row["hash_ids"][: prompt_tokens // BLOCK_TOKENS]
        chain = tuple(int(block).to_bytes(BLOCK_ID_BYTES, "big") for block in ids)
        earlier = (ends[block] for block in reversed(chain[1:]) if block in ends)
        session = next(earlier, f"s{number}")
        if len(chain) > 1:
            ends[chain[-1]] = session
        requests.append(
            TraceRequest(
                arrival_s=(stamp + share * (following[stamp] - stamp)) / 1000,
                prompt_tokens=prompt_tokens,
                output_tokens=max(1, int(row["output_length"])),
                chain=chain,
                session=session,
            )
        )
    return requests


def single_cache_hit_rate(requests: Sequence[TraceRequest], blocks: int) -> float:
    """The share of prompt tokens that one cache of `blocks` blocks would have, one request at a time.

    Raises:
        NoFreeBlocks: a single prompt is larger than the cache.
    """
    pool = BlockPool(blocks)
    hits = 0
    for request in requests:
        chain = request.chain
        held = pool.match(chain)
        hits += min(held * BLOCK_TOKENS, request.prompt_tokens - 1)
        owned = pool.acquire(chain[:held])
        fresh = pool.allocate(len(chain) - held)
        for index, block in enumerate(fresh, held):
            owned.append(pool.share(block, chain[index], chain[index - 1] if index else None))
        pool.release(owned)
        pool.take_events()
    return hits / max(1, sum(request.prompt_tokens for request in requests))
