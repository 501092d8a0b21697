"""What a name on the command line offers: step times, devices, and room for KV."""

from __future__ import annotations

from dataclasses import dataclass

from baton.config import BadSetting
from baton.planning.fleet import Offer
from baton.routing import Role
from baton.sim.cluster import WorkerSpec
from baton.sim.profiles import speed_of

_TENSOR_PARALLEL = ("distserve:", "splitwise:")


@dataclass(frozen=True)
class Hardware:
    """What workers of every offer have in common.

    A worker on n devices has n times `gpu_bytes`, of which it takes the share `utilization` for the model's
    `weight_bytes` and KV; `kv_tokens`, if it is not 0, is what it holds instead, whatever that comes to.
    With 0 `max_batch_tokens` it chooses by its step times.
    """

    gpu_bytes: float
    weight_bytes: float
    kv_bytes_per_token: int
    block_tokens: int = 16
    utilization: float = 0.9
    kv_tokens: int = 0
    max_batch_tokens: int = 0
    max_batch_requests: int = 256
    network_bytes_per_s: float = 12.5e9


def offer_of(name: str, hardware: Hardware) -> Offer:
    """The worker that `NAME` or `NAME@GPUS` stands for.

    Args:
        name: of a profile, see `baton.sim.profiles.NAMES`; its devices are GPUs, else the degree of tensor
            parallelism that a published profile was measured at, else 1.

    Raises:
        BadSetting: there is no such profile, or the model does not fit so many devices.
    """
    profile, _, count = name.partition("@")
    if not count:
        count = profile.rpartition(":")[2] if profile.startswith(_TENSOR_PARALLEL) else "1"
    if not count.isdecimal() or int(count) < 1:
        raise BadSetting(f"--profile {name}: {count!r} is not a number of GPUs", field="profile")
    gpus = int(count)
    speed = speed_of(profile)
    free_bytes = hardware.gpu_bytes * hardware.utilization * gpus - hardware.weight_bytes
    kv_tokens = hardware.kv_tokens or int(free_bytes / hardware.kv_bytes_per_token)
    if kv_tokens < hardware.block_tokens:
        raise BadSetting(
            f"--profile {name}: weights of {hardware.weight_bytes:.3g} bytes leave no room for KV on {gpus} "
            f"GPUs of {hardware.gpu_bytes:.3g}; give more GPUs as {profile}@GPUS",
            field="profile",
        )
    spec = WorkerSpec(
        Role.HYBRID,
        speed,
        kv_blocks=kv_tokens // hardware.block_tokens,
        max_batch_tokens=hardware.max_batch_tokens or speed.step_size(hardware.max_batch_requests),
        max_batch_requests=hardware.max_batch_requests,
        network_bytes_per_s=hardware.network_bytes_per_s,
        gpus=gpus,
    )
    return Offer(name, spec)
