"""Which devices a worker uses, and are they there?"""

from __future__ import annotations

import torch

from baton.config import Settings
from baton.device import devices_from
from baton.errors import BatonError


def devices_of(settings: Settings) -> list[torch.device]:
    """What the model is spread over, --tensor-parallel in number.

    Raises:
        BatonError: there are not so many GPUs.
    """
    count = settings.engine.tensor_parallel
    if settings.model.device == "cpu":
        return devices_from(torch.device("cpu"), count)
    if not torch.cuda.is_available():
        raise BatonError("--device cuda: torch sees no GPU; `baton doctor` says why")
    first, there = settings.model.gpu, torch.cuda.device_count()
    if first + count > there:
        raise BatonError(
            f"--tensor-parallel {count} --gpu {first} needs GPU {first + count - 1}; this machine has {there}"
        )
    return devices_from(torch.device("cuda", first), count)
