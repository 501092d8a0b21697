"""How many KV blocks a worker keeps, and how long its contexts can be."""

from __future__ import annotations

import psutil
import torch

from baton.config import EngineSettings
from baton.errors import BatonError

CPU_SHARE = 0.125
CUDA_SHARE = 0.85


def pool_blocks(settings: EngineSettings, block_bytes: int, device: torch.device) -> int:
    """Blocks of the pool: --kv-blocks, else what fits --kv-bytes, else a share of the free memory.

    Raises:
        BatonError: not even one block fits.
    """
    if settings.kv_blocks:
        return settings.kv_blocks
    budget = settings.kv_bytes or _free_share(device)
    blocks = budget // block_bytes
    if blocks < 1:
        raise BatonError(
            f"a KV block takes {block_bytes} bytes and only {budget} are there for the pool; "
            "free memory or raise --kv-bytes"
        )
    return blocks


def _free_share(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    return int(psutil.virtual_memory().available * CPU_SHARE)
