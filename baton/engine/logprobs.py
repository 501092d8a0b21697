"""Log-probabilities of chosen tokens and of the most likely ones, computed where the logits are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.sampling import PositionLogprobs, TokenLogprob


@dataclass(frozen=True)
class LogprobRows:
    """Of some positions: the chosen token's id, log-probability and rank (one each per row), and the ids and
    log-probabilities of the most likely tokens [rows, widest]; row i wants `counts[i]` of those."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    counts: Sequence[int]

    @classmethod
    def of(cls, logprobs: torch.Tensor, chosen: torch.Tensor, counts: Sequence[int]) -> LogprobRows:
        """logprobs is [rows, vocab] in nats, chosen int64 [rows]."""
        values = logprobs.gather(1, chosen[:, None])
        ranks = (logprobs > values).sum(-1) + 1
        widest = max(counts)
        if widest:
            top_values, top_ids = logprobs.topk(widest, dim=-1)
        else:
            top_values, top_ids = values[:, :0], chosen[:, None][:, :0]
        return cls((chosen, values[:, 0], ranks, top_ids, top_values), counts)

    def read(self, host: Sequence[torch.Tensor]) -> list[PositionLogprobs]:
        """The rows; `host` are the tensors on the CPU."""
        ids, values, ranks, top_ids, top_values = (tensor.tolist() for tensor in host)
        return [
            PositionLogprobs(
                TokenLogprob(token, value, rank),
                tuple(
                    TokenLogprob(t, v, r)
                    for r, (t, v) in enumerate(zip(row_ids[:count], row_values[:count], strict=True), 1)
                ),
            )
            for token, value, rank, row_ids, row_values, count in zip(
                ids, values, ranks, top_ids, top_values, self.counts, strict=True
            )
        ]
