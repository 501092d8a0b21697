"""What names a KV block: a chained 128-bit hash of the tokens up to and including it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import iter_unpack

BLOCK_ID_BYTES = 16


@dataclass(frozen=True)
class KvLayout:
    """What must agree between two pools for blocks to be copied byte for byte.

    `format` names the order of axes inside a block; `block_bytes` covers all layers, keys and values.
    """

    model_fingerprint: str
    dtype: str
    block_size: int
    block_bytes: int
    format: str

    def root(self, cache_salt: str = "") -> bytes:
        """The id that starts every chain of this layout and tenant: 16 bytes."""
        digest = blake2b(digest_size=BLOCK_ID_BYTES, person=b"baton-kv-root")
        for part in (self.model_fingerprint, self.dtype, str(self.block_size), self.format, cache_salt):
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
        return digest.digest()


def extend_chain(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Ids of the full blocks of `token_ids`, chained from `parent` (a root or the block before).

    `token_ids` are 32-bit unsigned; a trailing part shorter than `block_size` has no id.
    """
    stride = array("I").itemsize * block_size
    packed = memoryview(array("I", token_ids)).cast("B")
    whole = packed[: len(packed) // stride * stride]
    # Behind its parent of fixed length a block of up to 28 tokens fits BLAKE2b's 128 bytes: with the parent
    # as BLAKE2b's key, which takes 128 bytes of its own, every block would take a second compression.
    return [
        parent := blake2b(parent + tokens, digest_size=BLOCK_ID_BYTES).digest()
        for (tokens,) in iter_unpack(f"{stride}s", whole)
    ]
