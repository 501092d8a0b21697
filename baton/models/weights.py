"""Where a checkpoint's tensors come from: safetensors files, memory-mapped, one or many."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from baton.errors import UnsupportedModel

_CHUNK_BYTES = 64 * 1024 * 1024
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)

Part = Callable[[torch.Tensor], torch.Tensor]
"""Which part of a tensor is wanted: only that leaves the file."""


def _all(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Weights:
    """The tensors of one model folder by name, memory-mapped, converted to `dtype` on `device` as they are
    taken.

    Raises (all methods): UnsupportedModel, in one sentence that names the file or the tensor.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.path, self.device, self.dtype = path, device, dtype
        self.files = _shards(path)
        self._file_of: dict[str, int] = {}
        self._open: list[Any] = []  # safetensors types neither keys() nor get_tensor()
        for number, file in enumerate(self.files):
            try:
                shard: Any = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UnsupportedModel(f"{file} is not a readable safetensors file: {error}") from error
            self._open.append(shard)
            self._file_of.update(dict.fromkeys(shard.keys(), number))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, *shape: int, part: Part = _all) -> torch.Tensor:
        """The `part` of tensor `name`, which must have `shape`, in memory of its own: the file may change
        under a mapping, and a model must not."""
        tensor = self.borrow(name, *shape, part=part)
        return tensor.clone() if tensor.device.type == "cpu" else tensor

    def borrow(self, name: str, *shape: int, part: Part = _all) -> torch.Tensor:
        """As `take`, but perhaps still in the file: for callers that copy it."""
        if name not in self._file_of:
            raise UnsupportedModel(f"{self.path} has no tensor {name}")
        tensor: torch.Tensor = self._open[self._file_of[name]].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModel(
                f"{self.path}: tensor {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        if tensor.dtype not in _FLOATING:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedModel(f"{self.path}: tensor {name} has dtype {dtype}, which is not supported")
        return part(tensor).to(self.device, self.dtype).contiguous()


def fingerprint(files: Sequence[Path], extra: bytes) -> str:
    """A 128-bit hex digest of the contents of `files` in order and of `extra`.

    Files are hashed in chunks by parallel threads (hashlib lets go of the GIL), then the digests.
    """
    chunks = [(file, start) for file in files for start in range(0, file.stat().st_size, _CHUNK_BYTES)]
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        digests = list(pool.map(_hash_chunk, chunks))
    whole = blake2b(digest_size=16, person=b"baton-model")
    whole.update(len(digests).to_bytes(8, "little"))
    for digest in digests:
        whole.update(digest)
    whole.update(extra)
    return whole.hexdigest()


def _hash_chunk(chunk: tuple[Path, int]) -> bytes:
    file, start = chunk
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped)[start : start + _CHUNK_BYTES] as part,
    ):
        return blake2b(part, digest_size=32).digest()


def _shards(path: Path) -> list[Path]:
    index = path / _INDEX
    if index.is_file():
        try:
            table = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except msgspec.DecodeError as error:
            raise UnsupportedModel(f"{index} is not a safetensors index: {error}") from error
        names = sorted(set(table.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UnsupportedModel(f"{index} names {name[:128]!r}, no safetensors file beside it")
        files = [path / name for name in names]
    else:
        files = [path / _SINGLE]
    for file in files:
        if not file.is_file():
            raise UnsupportedModel(f"{path} has no weights file {file.name}; only safetensors are read")
    return files


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
