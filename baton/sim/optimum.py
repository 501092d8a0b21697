"""How much of a workload's prompts could be found cached at best?"""

from __future__ import annotations

from collections.abc import Sequence

from baton.kv.pool import BlockPool
from baton.sim.workload import SimRequest


def single_cache_hit_rate(requests: Sequence[SimRequest], block_tokens: int, blocks: int) -> float:
    """The share of prompt tokens that one cache of `blocks` blocks would have, one request at a time.

    Raises:
        NoFreeBlocks: a single prompt is larger than the cache.
    """
    pool = BlockPool(blocks)
    hits = 0
    for request in requests:
        chain = request.chain[:]
        held = pool.match(chain)
        hits += min(held * block_tokens, request.prompt_tokens - 1)
        owned = pool.acquire(chain[:held])
        fresh = pool.allocate(len(chain) - held)
        for index, block in enumerate(fresh, held):
            owned.append(pool.share(block, chain[index], chain[index - 1] if index else None))
        pool.release(owned)
        pool.take_events()
    return hits / max(1, sum(request.prompt_tokens for request in requests))
