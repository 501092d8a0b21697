"""How many KV blocks a worker keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.config import EngineSettings
from baton.errors import BatonError
from baton.machine import available_bytes

_CPU_SHARE = 1 / 8
_CPU_BYTES = 1024**3


def pool_blocks(
    settings: EngineSettings, block_bytes: int, longest_context_blocks: int, devices: Sequence[torch.device]
) -> int:
    """Blocks of the pool: --kv-blocks, else what fits --kv-bytes, else what the devices can spare.

    Each of the model's `devices` keeps `block_bytes` of every block, and has --kv-bytes for them. Call it
    when the weights are in place.

    Raises:
        BatonError: not even one block fits.
    """
    if settings.kv_blocks:
        return settings.kv_blocks
    spare = _spare_gpu_bytes if devices[0].type == "cuda" else _spare_host_bytes
    budget = settings.kv_bytes or spare(settings, block_bytes * longest_context_blocks, devices)
    blocks = budget // block_bytes
    if blocks < 1:
        raise BatonError(
            f"a KV block takes {block_bytes} bytes and only {budget} are there for the pool; "
            "free memory or raise --kv-bytes"
        )
    return blocks


def _spare_gpu_bytes(
    settings: EngineSettings, longest_context_bytes: int, devices: Sequence[torch.device]
) -> int:
    # Of the whole, not of what is free now: workers that share a GPU start at the same time.
    return min(
        int(torch.cuda.mem_get_info(device)[1] * settings.gpu_memory_utilization)
        - torch.cuda.memory_reserved(device)
        for device in devices
    )


def _spare_host_bytes(
    settings: EngineSettings, longest_context_bytes: int, devices: Sequence[torch.device]
) -> int:
    most = min(int(available_bytes() * _CPU_SHARE), max(_CPU_BYTES, longest_context_bytes * len(devices)))
    return most // len(devices)
