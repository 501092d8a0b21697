"""Where in the pool the new tokens of a step go."""

from __future__ import annotations

import torch

from baton.attention.base import AttentionBatch


def new_token_slots(batch: AttentionBatch, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(block id, offset in the block) of every new token in batch order, int64 [tokens] each, on the CPU."""
    new, contexts = torch.tensor(batch.query_lens), torch.tensor(batch.context_lens)
    used = [-(-context // block_size) for context in batch.context_lens]
    blocks = torch.tensor(
        [block for table, count in zip(batch.block_tables, used, strict=True) for block in table[:count]]
    )
    first_blocks = torch.tensor(used).cumsum(0) - torch.tensor(used)
    sequence = torch.arange(len(new)).repeat_interleave(new)
    # A token's position: how far it is into its sequence's new tokens, after what was there before.
    positions = torch.arange(len(sequence)) - (new.cumsum(0) - contexts)[sequence]
    return blocks[first_blocks[sequence] + positions // block_size], positions % block_size
