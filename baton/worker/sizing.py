"""How many KV blocks a worker keeps."""

from __future__ import annotations

import torch

from baton.config import EngineSettings
from baton.errors import BatonError
from baton.machine import available_bytes

_CPU_SHARE = 1 / 8
_CPU_BYTES = 1024**3


def pool_blocks(
    settings: EngineSettings, block_bytes: int, longest_context_blocks: int, device: torch.device
) -> int:
    """Blocks of the pool: --kv-blocks, else what fits --kv-bytes, else what the device can spare.

    Call it when the weights are in place.

    Raises:
        BatonError: not even one block fits.
    """
    if settings.kv_blocks:
        return settings.kv_blocks
    budget = settings.kv_bytes or _spare_bytes(settings, block_bytes * longest_context_blocks, device)
    blocks = budget // block_bytes
    if blocks < 1:
        raise BatonError(
            f"a KV block takes {block_bytes} bytes and only {budget} are there for the pool; "
            "free memory or raise --kv-bytes"
        )
    return blocks


def _spare_bytes(settings: EngineSettings, longest_context_bytes: int, device: torch.device) -> int:
    if device.type == "cuda":
        # Of the whole, not of what is free now: workers that share a GPU start at the same time.
        _, total = torch.cuda.mem_get_info(device)
        return int(total * settings.gpu_memory_utilization) - torch.cuda.memory_reserved(device)
    return min(int(available_bytes() * _CPU_SHARE), max(_CPU_BYTES, longest_context_bytes))
