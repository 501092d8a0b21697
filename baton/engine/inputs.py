"""What the model is given in a step, flattened from the sequences in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.attention.base import AttentionBatch
from baton.engine.scheduler import Scheduled
from baton.engine.sequence import Sequence as Choice


@dataclass(frozen=True)
class Inputs:
    """`tokens` with their `positions` in their contexts, and `attention` over them.

    The tokens numbered `unseen` are not known yet: they are rows `unseen_rows` of what the step before
    sampled. `wanted` are the numbers of the tokens whose logits count.
    """

    tokens: list[int]
    positions: list[int]
    attention: AttentionBatch
    unseen: list[int]
    unseen_rows: list[int]
    wanted: list[int]

    @classmethod
    def of(cls, batch: Sequence[Scheduled], rows_before: Mapping[Choice, int]) -> Inputs:
        """`rows_before` are the rows that the step before sampled, by sequence."""
        tokens: list[int] = []
        positions: list[int] = []
        unseen: list[int] = []
        unseen_rows: list[int] = []
        wanted: list[int] = []
        for item in batch:
            sequence, end = item.sequence, item.start + item.query_len
            if predicts_prompt(item):
                wanted += range(len(tokens), len(tokens) + item.query_len)
            elif item.samples:
                wanted.append(len(tokens) + item.query_len - 1)
            tokens += sequence.tokens[item.start : end]
            positions += range(item.start, end)
            if len(tokens) < len(positions):
                unseen.append(len(tokens))
                unseen_rows.append(rows_before[sequence])
                tokens.append(0)
        attention = AttentionBatch(
            query_lens=[item.query_len for item in batch],
            context_lens=[item.start + item.query_len for item in batch],
            block_tables=[item.sequence.blocks for item in batch],
        )
        return cls(tokens, positions, attention, unseen, unseen_rows, wanted)


def predicts_prompt(item: Scheduled) -> bool:
    """Whether log-probabilities are wanted of the prompt tokens right after each query token."""
    sequence = item.sequence
    return sequence.wants_prompt_logprobs and item.start < sequence.prompt_len
