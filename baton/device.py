"""What is asked of a device beside arithmetic: moving small tensors without waiting, and graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class Download(ABC):
    """Tensors on their way to the host."""

    @abstractmethod
    def wait(self) -> list[torch.Tensor]:
        """The tensors on the CPU, when everything that was asked of the device before them is done."""


class Device(ABC):
    """Where a model runs. What is asked of it runs in the order asked; call it from one thread."""

    torch_device: torch.device

    @abstractmethod
    def tensor(self, values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        """`values` as a tensor [len(values)] on the device. Does not wait for what the device computes."""

    @abstractmethod
    def stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU with the same values, which the device can copy without anybody waiting."""

    @abstractmethod
    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU, which nobody writes to any more, on the device. Does not wait either."""

    @abstractmethod
    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        """Begin to copy `tensors` to the host. They may be written again by what is asked later."""

    @abstractmethod
    def graph(self, compute: Callable[[], None]) -> Callable[[], None]:
        """A function that does what `compute` does, on the tensors at the very addresses it uses now.

        Raises RuntimeError where the device cannot record it, such as when it waits for a result.
        """

    @abstractmethod
    def beside(self) -> AbstractContextManager[object]:
        """While it is entered, what this thread asks of the device runs beside what others ask of it; leaving
        waits for that."""

    @abstractmethod
    def current(self) -> AbstractContextManager[object]:
        """While it is entered, this thread uses the device."""


def device_of(torch_device: torch.device) -> Device:
    return CudaDevice(torch_device) if torch_device.type == "cuda" else HostDevice(torch_device)


def devices_from(first: torch.device, count: int) -> list[torch.device]:
    """`first` and the GPUs that follow it, `count` in all; of the CPU, it alone so many times."""
    if first.type != "cuda":
        return [first] * count
    start = first.index or 0
    return [torch.device("cuda", start + number) for number in range(count)]


class HostDevice(Device):
    """The CPU: everything is done when it is asked, and a graph is the computation itself."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    def tensor(self, values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    def stage(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        return _Here(list(tensors))

    def graph(self, compute: Callable[[], None]) -> Callable[[], None]:
        compute()
        return compute

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()


class CudaDevice(Device):
    """An NVIDIA GPU. Host memory is pinned, because copies from other memory wait for the device; torch
    keeps it until they are done. Graphs share one pool of memory, so they are recorded on one stream."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self._pool: Any = None  # torch does not name the type of its handle
        self._side: torch.cuda.Stream | None = None

    def tensor(self, values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return self.send(torch.tensor(values, dtype=dtype))

    def stage(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.stage(tensor).to(self.torch_device, non_blocking=True)

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        # Copied first: the next step may write the tensors in place.
        landed = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for host, tensor in zip(landed, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.torch_device))
        return _Landing(landed, done)

    def graph(self, compute: Callable[[], None]) -> Callable[[], None]:
        with self.current():
            if self._side is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._side = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
            side = self._side
            current = torch.cuda.current_stream(self.torch_device)
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    compute()  # kernels are compiled and libraries prepared now
                    _refusing_to_wait(compute)
            finally:
                current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                compute()
        return graph.replay

    @contextmanager
    def beside(self) -> Iterator[None]:
        stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.torch_device)


class _Here(Download):
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor]:
        return self._tensors


class _Landing(Download):
    def __init__(self, landed: list[torch.Tensor], done: torch.cuda.Event) -> None:
        self._landed, self._done = landed, done

    def wait(self) -> list[torch.Tensor]:
        self._done.synchronize()
        return self._landed


def _refusing_to_wait(compute: Callable[[], None]) -> None:
    """Run `compute`; RuntimeError if it waits for the device. In a capture that would spoil more than it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute()
    finally:
        torch.cuda.set_sync_debug_mode(before)
