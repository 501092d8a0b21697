"""Is what arrived what was there? Digests of blocks, of the worker that has them and of the one that reads.

The lease rule makes a wrong block impossible as far as baton goes. This is for what is below it: a network, a
driver or a memory that is not to be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from baton.errors import HandoffFailed

if TYPE_CHECKING:
    import torch

DIGEST_BYTES = 16


def digests_of(storage: torch.Tensor, blocks: Sequence[int]) -> list[bytes]:
    """BLAKE2b of each block's bytes; blocks on a GPU are copied to the host. Takes about 1 ns a byte.

    `storage` is the KV pool, its first axis the block id.
    """
    import torch

    flat = storage.flatten(1).view(torch.uint8)
    return [blake2b(flat[block].cpu().numpy().data, digest_size=DIGEST_BYTES).digest() for block in blocks]


def require_equal(
    source: str, blocks: Sequence[int], expected: Sequence[bytes], found: Sequence[bytes]
) -> None:
    """
    Raises:
        HandoffFailed: naming the first of the source's `blocks` that did not arrive as it was there, or the
            source gave no digests.
    """
    if len(expected) != len(found):
        raise HandoffFailed(f"{source} named {len(found)} blocks with {len(expected)} digests")
    for block, there, here in zip(blocks, expected, found, strict=True):
        if there != here:
            raise HandoffFailed(f"block {block} of {source} arrived with another content than it has there")
