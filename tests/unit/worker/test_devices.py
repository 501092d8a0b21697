"""A worker says at start when the devices it is to use are not there, and sizes its pool by each of them."""

from __future__ import annotations

import pytest
import torch

from baton.config import resolve
from baton.errors import BatonError
from baton.worker.devices import devices_of
from baton.worker.sizing import pool_blocks

GPUS = [torch.device("cuda", number) for number in range(2)]


def test_fewer_gpus_than_tensor_parallel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings, _ = resolve({"device": "cuda", "gpu": 1, "tensor_parallel": 2}, {})
    assert devices_of(resolve({"device": "cuda", "tensor_parallel": 2}, {})[0]) == GPUS
    with pytest.raises(BatonError, match="--tensor-parallel 2 --gpu 1 needs GPU 2; this machine has 2"):
        devices_of(settings)


def test_the_fullest_gpu_decides_how_many_blocks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000 * (1 + device.index))
    settings, _ = resolve({"gpu_memory_utilization": 0.5}, {})
    assert pool_blocks(settings.engine, 100, 1, GPUS) == 30
    assert pool_blocks(settings.engine, 100, 1, GPUS[:1]) == 40


def test_bytes_and_blocks_that_are_given_hold_for_each_device() -> None:
    assert pool_blocks(resolve({"kv_bytes": 1000}, {})[0].engine, 100, 1, GPUS) == 10
    assert pool_blocks(resolve({"kv_blocks": 7}, {})[0].engine, 100, 1, GPUS) == 7
