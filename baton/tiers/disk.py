"""KV blocks in a file that belongs to one worker process and ends with it."""

from __future__ import annotations

import os
import tempfile
from hashlib import blake2b
from pathlib import Path

from baton.errors import BatonError

_DIGEST_BYTES = 16


class BlockFile:
    """`slots` blocks of `block_bytes` bytes in one preallocated file under `folder`.

    The file has no name: it is unlinked as soon as it is open, so that its space comes back however the
    process ends. Digests of what was written stay in memory.

    Raises:
        BatonError: the folder cannot be used or has too little room.
    """

    def __init__(self, folder: Path, slots: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._digests: dict[int, bytes] = {}
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="baton-kv-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise BatonError(f"--kv-disk-path {folder}: {error.strerror}") from error
        try:
            os.posix_fallocate(self._file.fileno(), 0, slots * block_bytes)
        except OSError as error:
            self._file.close()
            raise BatonError(
                f"--kv-disk-path {folder} has no room for {slots * block_bytes} bytes "
                f"(--kv-disk-bytes): {error.strerror}"
            ) from error

    def write(self, slot: int, block: memoryview) -> None:
        """Raises OSError."""
        self._digests.pop(slot, None)
        at, rest = slot * self._block_bytes, block
        while rest:
            written = os.pwrite(self._file.fileno(), rest, at)
            at, rest = at + written, rest[written:]
        self._digests[slot] = _digest(block)

    def read(self, slot: int, block: memoryview) -> str:
        """Fill `block` with what was written to the slot; if that fails, why, in one word for a metric."""
        at, rest = slot * self._block_bytes, block
        try:
            while rest:
                count = os.preadv(self._file.fileno(), [rest], at)
                if not count:
                    return "short"
                at, rest = at + count, rest[count:]
        except OSError:
            return "io_error"
        return "" if _digest(block) == self._digests.get(slot) else "checksum"

    def forget_cached_pages(self) -> None:
        """Let the next reads come from the disk itself."""
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


def _digest(block: memoryview) -> bytes:
    return blake2b(block, digest_size=_DIGEST_BYTES).digest()
