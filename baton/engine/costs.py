"""How much arithmetic and memory traffic engine steps are, by the model's shape: for MFU and MBU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from baton.engine.scheduler import Scheduled
from baton.models.config import ModelConfig


@dataclass
class Tally:
    """What an engine has computed since its start, and for how long it had something to compute.

    `attended_pairs` are pairs of a new token and a token it attends to, `read_tokens` tokens whose KV a step
    read, once per sequence; windows are not taken off. `sampled_tokens` went through the output layer.
    """

    steps: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    attended_pairs: int = 0
    read_tokens: int = 0
    _began_s: float = field(default_factory=time.monotonic)
    _idle_s: float = 0.0
    _idle_since_s: float = 0.0

    def count(self, item: Scheduled) -> None:
        """Add one sequence's part of a step."""
        tokens, end = item.query_len, item.start + item.query_len
        self.computed_tokens += tokens
        self.sampled_tokens += item.samples
        self.attended_pairs += tokens * end - tokens * (tokens - 1) // 2
        self.read_tokens += end

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While entered, there is nothing to compute."""
        self._idle_since_s = time.monotonic()
        yield
        self._idle_s += time.monotonic() - self._idle_since_s
        self._idle_since_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute now."""
        return bool(self._idle_since_s)

    def busy_s(self) -> float:
        """Seconds with something to compute, from the start until now."""
        now_s = time.monotonic()
        idle_s = self._idle_s + (now_s - self._idle_since_s if self._idle_since_s else 0.0)
        return max(0.0, now_s - self._began_s - idle_s)


@dataclass(frozen=True)
class Peak:
    """What a device can do at best: dense arithmetic in 16 bits, and reading its memory."""

    flops_per_s: float
    bytes_per_s: float


# By the name the driver gives the device, from NVIDIA's data sheets; the first that fits counts.
_PEAKS = {
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100": Peak(989e12, 3.35e12),
    "GH200": Peak(989e12, 4.0e12),
    "H200": Peak(989e12, 4.8e12),
    "B200": Peak(2250e12, 8.0e12),
    "A100-SXM4-80GB": Peak(312e12, 2.04e12),
    "A100": Peak(312e12, 1.56e12),
    "L40S": Peak(362e12, 0.864e12),
    "L40": Peak(181e12, 0.864e12),
    "L4": Peak(121e12, 0.3e12),
}


def peak_of(device_name: str, count: int = 1) -> Peak | None:
    """The peak of `count` GPUs by their name; None when it is not known, as for CPUs."""
    peak = next((peak for name, peak in _PEAKS.items() if name in device_name), None)
    return peak and Peak(count * peak.flops_per_s, count * peak.bytes_per_s)


@dataclass(frozen=True)
class Costs:
    """One model's arithmetic per unit of work, and its bytes. A multiply-add is two operations."""

    flops_per_token: int
    flops_per_pair: int
    flops_per_sampled: int
    weight_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, config: ModelConfig, weight_bytes_each: int, kv_bytes_per_token: int) -> Costs:
        """Of a model whose numbers take `weight_bytes_each` bytes each. Of experts, only those a token goes
        through count as arithmetic; all of them as read."""
        hidden, fields = config.hidden_size, config.fields
        attention = hidden * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
        chosen = fields.optional_integer("num_experts_per_tok")
        inner = fields.optional_integer("moe_intermediate_size") if chosen else None
        expert = 3 * hidden * (inner or fields.positive("intermediate_size"))
        experts = fields.optional_integer("num_local_experts") or fields.optional_integer("num_experts")
        active = config.layers * (attention + (chosen or 1) * expert)
        held = config.layers * (attention + (experts if chosen and experts else 1) * expert)
        head = hidden * config.vocab_size
        return cls(
            flops_per_token=2 * active,
            flops_per_pair=4 * config.layers * config.heads * config.head_dim,
            flops_per_sampled=2 * head,
            weight_bytes=(held + head) * weight_bytes_each,
            kv_bytes_per_token=kv_bytes_per_token,
        )

    def flops(self, tally: Tally) -> int:
        return (
            self.flops_per_token * tally.computed_tokens
            + self.flops_per_pair * tally.attended_pairs
            + self.flops_per_sampled * tally.sampled_tokens
        )

    def read_bytes(self, tally: Tally) -> int:
        return self.weight_bytes * tally.steps + self.kv_bytes_per_token * tally.read_tokens
