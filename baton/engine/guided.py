"""Which tokens the guided sequences of a batch may not take, as one mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.device import Device
from baton.engine.sequence import Sequence as Choice


def guided(choices: Sequence[Choice]) -> list[int]:
    """The rows of the sequences that have a guide."""
    return [row for row, choice in enumerate(choices) if choice.guide is not None]


def forbidden(choices: Sequence[Choice], vocab_size: int, device: Device) -> torch.Tensor:
    """bool [len(choices), vocab_size]: True for what may not come next. All have a guide.

    Guides work on the CPU, while the device computes the step; one bit for each token travels there.
    """
    allowed = torch.zeros((len(choices), -(-vocab_size // 32) * 4), dtype=torch.uint8)
    for choice, row in zip(choices, allowed, strict=True):
        assert choice.guide is not None
        choice.guide.fill(choice.tokens, row.data_ptr(), row.numel())
        if choice.guide.failure:
            row.fill_(255)
    sent = device.send(allowed)
    bits = torch.arange(8, dtype=torch.uint8, device=sent.device)
    spread = sent[:, :, None].bitwise_right_shift(bits).bitwise_and(1)
    return spread.eq(0).flatten(1)[:, :vocab_size]
