"""The least that can run a model: sequences, block tables, steps. Stands in for the engine in model tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from baton.attention.base import AttentionBatch
from baton.attention.select import create_attention
from baton.models.base import Model


@dataclass
class Running:
    """`tokens` known so far, of which the first `computed` are in the pool; one row of `hidden` for each."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    hidden: list[torch.Tensor] = field(default_factory=list)


class Driver:
    """Runs sequences through `model` in steps whose make-up the caller decides.

    Blocks are handed out in random order, so a table is never a range by accident.
    """

    def __init__(self, model: Model, *, blocks: int = 400, block_size: int = 16, seed: int = 0) -> None:
        self.model, self.block_size = model, block_size
        self.attention = create_attention(model, blocks, block_size)
        self._free = list(range(blocks))
        random.Random(seed).shuffle(self._free)

    def step(self, work: Sequence[tuple[Running, int]]) -> torch.Tensor:
        """Compute the next `count` known tokens of each sequence; returns hidden states [tokens, hidden]."""
        tokens: list[int] = []
        positions: list[int] = []
        for sequence, count in work:
            end = sequence.computed + count
            while len(sequence.blocks) * self.block_size < end:
                sequence.blocks.append(self._free.pop())
            tokens += sequence.tokens[sequence.computed : end]
            positions += range(sequence.computed, end)
        self.attention.begin(
            AttentionBatch(
                query_lens=[count for _, count in work],
                context_lens=[sequence.computed + count for sequence, count in work],
                block_tables=[sequence.blocks for sequence, _ in work],
            )
        )
        device = self.model.device
        hidden = self.model.forward(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), self.attention
        )
        for (sequence, count), rows in zip(work, hidden.split([count for _, count in work]), strict=True):
            sequence.computed += count
            sequence.hidden.append(rows)
        return hidden

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, *, chunk: int) -> list[list[int]]:
        """Greedy continuations, all prompts in one batch, at most `chunk` tokens of each per step."""
        running = [Running(list(prompt)) for prompt in prompts]
        ends = [len(prompt) + tokens for prompt in prompts]
        while any(len(each.tokens) < end for each, end in zip(running, ends, strict=True)):
            active = [each for each, end in zip(running, ends, strict=True) if len(each.tokens) < end]
            work = [(each, min(chunk, len(each.tokens) - each.computed)) for each in active]
            hidden = self.step(work)
            last = torch.tensor([count for _, count in work]).cumsum(0) - 1
            best = self.model.logits(hidden[last.to(hidden.device)]).argmax(-1).tolist()
            for (each, _), token in zip(work, best, strict=True):
                if each.computed == len(each.tokens):
                    each.tokens.append(token)
        return [each.tokens[len(prompt) :] for each, prompt in zip(running, prompts, strict=True)]

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """float32 [len(tokens), vocab] of a sequence computed at once."""
        return self.model.logits(self.step([(Running(list(tokens)), len(tokens))]))
