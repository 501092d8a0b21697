"""Rotary position embeddings: frequencies of every scaling type, and turning queries and keys."""

from __future__ import annotations

import math

import torch

from baton.kernels import fused
from baton.models import native
from baton.models.rope_config import RopeConfig


class Rotary:
    """cos and sin of every position, float32 [max_len, rotary_dim / 2] each."""

    def __init__(self, config: RopeConfig, max_len: int, device: torch.device) -> None:
        positions = torch.arange(max_len, dtype=torch.float32)
        angles = positions[:, None] * frequencies(config, max_len)
        factor = attention_factor(config)
        self._cos = (angles.cos() * factor).to(device)
        self._sin = (angles.sin() * factor).to(device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of int64 `positions` [T], each [T, 1, rotary_dim / 2] to broadcast over heads."""
        return (
            self._cos.index_select(0, positions).unsqueeze(1),
            self._sin.index_select(0, positions).unsqueeze(1),
        )


def rotate(heads: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the leading dimensions of `heads` [T, heads, head_dim] by `turn` from `Rotary.at`.

    Dimension i turns with dimension i + rotary_dim / 2. Computed in float32, returned in heads' dtype.
    May use the memory of `heads` for the result.
    """
    cos, sin = turn
    half = cos.shape[-1]
    if fused.rotate(heads, cos, sin):
        return heads
    kernel = native.kernel("rotate", heads)
    if kernel is not None and heads.stride()[1:] == (heads.shape[2], 1):
        kernel(
            heads.data_ptr(),
            *heads.shape,
            heads.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            half,
            torch.get_num_threads(),
        )
        return heads
    wide = heads.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(heads.dtype)


def attention_factor(config: RopeConfig) -> float:
    """What cos and sin are multiplied by: yarn's and longrope's sharpening of long contexts."""
    if config.attention_factor is not None:
        return config.attention_factor
    scale = config.scale
    if config.kind == "yarn":
        if config.mscale and config.mscale_all_dim:
            return _yarn_sharpening(scale, config.mscale) / _yarn_sharpening(scale, config.mscale_all_dim)
        return _yarn_sharpening(scale, 1.0)
    if config.kind == "longrope" and scale > 1.0:
        return math.sqrt(1.0 + math.log(scale) / math.log(config.original_max))
    return 1.0


def frequencies(config: RopeConfig, max_len: int) -> torch.Tensor:
    """Radians per position of each turning pair, float32 [rotary_dim / 2].

    `max_len` is the longest sequence served; only longrope looks at it (see `RopeConfig.usual`).
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    wavelengths = config.theta**exponents
    plain = 1.0 / wavelengths
    if config.kind == "linear":
        return plain / config.scale
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, wavelengths)
    if config.kind == "longrope":
        factors = config.long_factors if max_len > config.original_max else config.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * wavelengths)
    return plain


def _llama3(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: slow turns are stretched by the factor, fast ones kept, those between blended."""
    turns_in_context = config.original_max / (2 * math.pi / plain)
    low, high = config.low_freq_factor, config.high_freq_factor
    share_kept = (turns_in_context - low) / (high - low)
    blended = (1 - share_kept) * plain / config.scale + share_kept * plain
    wavelength = 2 * math.pi / plain
    slow = wavelength > config.original_max / low
    fast = wavelength < config.original_max / high
    return torch.where(slow, plain / config.scale, torch.where(fast, plain, blended))


def _yarn(config: RopeConfig, wavelengths: torch.Tensor) -> torch.Tensor:
    """YaRN (arXiv:2309.00071): pairs that turn often keep their speed, rare ones are interpolated."""
    low = _yarn_pair(config, config.beta_fast)
    high = _yarn_pair(config, config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(config.rotary_dim // 2, dtype=torch.float32)
    share_kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return (1.0 / (config.scale * wavelengths)) * (1 - share_kept) + (1.0 / wavelengths) * share_kept


def _yarn_pair(config: RopeConfig, turns: float) -> float:
    """Which pair makes `turns` full turns within the original context."""
    context_per_radian = config.original_max / (turns * 2 * math.pi)
    return config.rotary_dim * math.log(context_per_radian) / (2 * math.log(config.theta))


def _yarn_sharpening(scale: float, strength: float) -> float:
    return 1.0 if scale <= 1.0 else 0.1 * strength * math.log(scale) + 1.0
