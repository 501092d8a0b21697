"""What names a KV block: a keyed 128-bit hash of the tokens up to and including it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import iter_unpack
from typing import overload

BLOCK_ID_BYTES = 16
_TOKEN_BYTES = array("I").itemsize


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


class ChainHasher:
    """Names the blocks of one chain from `root` on, in order.

    A block's id is BLAKE2b, keyed with the root, of all tokens up to and including the block: one hash runs
    along the chain, and reading it off costs one compression however long the chain is.
    """

    __slots__ = ("_hash",)

    def __init__(self, root: bytes) -> None:
        self._hash = blake2b(digest_size=BLOCK_ID_BYTES, key=root)

    def extend(self, token_ids: Sequence[int], block_size: int) -> list[bytes]:
        """Ids of the full blocks of `token_ids`, which go on where the last full block ended.

        `token_ids` are 32-bit unsigned; a trailing part shorter than `block_size` has no id, and is to be
        given again when it has grown.
        """
        update, digest = self._hash.update, self._hash.digest
        stride = _TOKEN_BYTES * block_size
        packed = memoryview(array("I", token_ids)).cast("B")
        ids = []
        for (tokens,) in iter_unpack(f"{stride}s", packed[: len(packed) // stride * stride]):
            update(tokens)
            ids.append(digest())
        return ids


def extend_chain(root: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Ids of all full blocks of a prompt. See `ChainHasher`."""
    return ChainHasher(root).extend(token_ids, block_size)


class Chain(Sequence[bytes]):
    """The ids that `extend_chain` gives, each computed when it is asked for.

    A search by halves asks for few of them; between those the hash runs over the tokens without a stop.
    Everything up to the last id asked for is hashed once, up to 1/32 of the chain again for each id.
    """

    __slots__ = ("_blocks", "_root", "_span", "_states", "_stride", "_tokens")

    def __init__(self, root: bytes, token_ids: Sequence[int], block_size: int) -> None:
        self._tokens = memoryview(array("I", token_ids)).cast("B")
        self._stride = _TOKEN_BYTES * block_size
        self._blocks = len(self._tokens) // self._stride
        # `_states` is the hash after every `_span` bytes, as far as it has come.
        self._span = self._stride * max(8, self._blocks // 32)
        self._root = root
        self._states = [blake2b(digest_size=BLOCK_ID_BYTES, key=root)]

    def __len__(self) -> int:
        return self._blocks

    @overload
    def __getitem__(self, at: int) -> bytes: ...

    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...

    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        if isinstance(at, slice):
            return list(self)[at]
        if at < 0:
            at += self._blocks
        if not 0 <= at < self._blocks:
            raise IndexError(f"block {at} of a chain of {self._blocks}")
        end = (at + 1) * self._stride
        full = end // self._span
        if full >= len(self._states):
            self._run_to(full)
        state = self._states[full]
        if rest := end % self._span:
            state = state.copy()
            state.update(self._tokens[end - rest : end])
        return state.digest()

    def _run_to(self, full: int) -> None:
        states, tokens, span = self._states, self._tokens, self._span
        state = states[-1]
        for start in range((len(states) - 1) * span, full * span, span):
            state = state.copy()
            state.update(tokens[start : start + span])
            states.append(state)

    def __iter__(self) -> Iterator[bytes]:
        return iter(ChainHasher(self._root).extend(self._tokens.cast("I"), self._stride // _TOKEN_BYTES))
