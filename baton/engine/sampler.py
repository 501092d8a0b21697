"""Which token comes next: penalties, masks, then a draw.

Every operation works on one row at a time, so a row's token does not depend on its batch. Nothing here
waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from baton.device import Device
from baton.engine.draw import draw, uniform
from baton.engine.guided import forbidden, guided
from baton.engine.logprobs import LogprobRows
from baton.engine.sequence import Sequence as Choice
from baton.sampling import PositionLogprobs


@dataclass(frozen=True)
class Sampled:
    """The token chosen for a row, with log-probabilities when they were asked for."""

    token_id: int
    logprobs: PositionLogprobs | None


@dataclass(frozen=True)
class SampledRows:
    """What `Sampler.sample` chose, still on the device: int64 `tokens`, one per row, and log-probabilities
    of the rows `asked`."""

    tokens: torch.Tensor
    asked: Sequence[int]
    logprobs: LogprobRows | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What `read` needs on the CPU."""
        return [self.tokens, *(() if self.logprobs is None else self.logprobs.tensors)]

    def read(self, host: Sequence[torch.Tensor]) -> list[Sampled]:
        """The rows; `host` are `tensors` on the CPU."""
        by_row: dict[int, PositionLogprobs] = {}
        if self.logprobs is not None:
            by_row = dict(zip(self.asked, self.logprobs.read(host[1:]), strict=True))
        ids: list[int] = host[0].tolist()
        return [Sampled(token, by_row.get(row)) for row, token in enumerate(ids)]


class Sampler:
    """Chooses one token per row of logits.

    `eos_token_ids` are the model's; they count as stop tokens for min_tokens unless a request
    ignores them.
    """

    def __init__(self, eos_token_ids: Iterable[int], device: Device) -> None:
        self._eos = tuple(eos_token_ids)
        self._device = device

    def sample(self, logits: torch.Tensor, choices: Sequence[Choice]) -> SampledRows:
        """One token per row.

        logits is [len(choices), vocab] float32 and is changed in place; row i belongs to choices[i]
        at its next position.
        """
        samplings = [choice.sampling for choice in choices]
        asked = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        raw = self._some(logits, asked).log_softmax(-1) if asked else None
        if rows := guided(choices):
            self._forbid(logits, [choices[row] for row in rows], rows)
        for row, choice in enumerate(choices):
            if _adjusts(choice):
                self._adjust(logits[row], choice)
        tokens = logits.argmax(-1)
        drawn = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
        if drawn:
            chosen = draw(
                self._some(logits, drawn),
                [samplings[row] for row in drawn],
                [uniform(samplings[row].seed, len(choices[row].tokens)) for row in drawn],
                self._device,
            )
            tokens = chosen if len(drawn) == len(choices) else tokens.index_copy(0, self._ids(drawn), chosen)
        if raw is None:
            return SampledRows(tokens, asked, None)
        counts = [samplings[row].logprobs or 0 for row in asked]
        return SampledRows(tokens, asked, LogprobRows.of(raw, self._some(tokens, asked), counts))

    def _some(self, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return values if len(rows) == values.shape[0] else values.index_select(0, self._ids(rows))

    def _ids(self, values: Sequence[int]) -> torch.Tensor:
        return self._device.tensor(values, torch.int64)

    def _pairs(self, items: Iterable[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, values = zip(*items, strict=True)
        return self._ids(ids), self._device.tensor(values, torch.float32)

    def _forbid(self, logits: torch.Tensor, choices: Sequence[Choice], rows: Sequence[int]) -> None:
        """Mask what the grammars of `choices`, whose rows are `rows`, do not allow."""
        mask = forbidden(choices, logits.shape[-1], self._device)
        if len(rows) == logits.shape[0]:
            logits.masked_fill_(mask, -torch.inf)
        else:
            kept = self._some(logits, rows).masked_fill_(mask, -torch.inf)
            logits.index_copy_(0, self._ids(rows), kept)

    def _adjust(self, row: torch.Tensor, choice: Choice) -> None:
        """Apply bias, penalties and the min_tokens mask to one row [vocab], in place."""
        sampling = choice.sampling
        if sampling.logit_bias:
            row.index_add_(0, *self._pairs(sampling.logit_bias.items()))
        if sampling.repetition_penalty != 1.0:
            ids = self._ids(sorted(set(choice.tokens)))
            seen = row.index_select(0, ids)
            factor = sampling.repetition_penalty
            row.index_copy_(0, ids, torch.where(seen > 0, seen / factor, seen * factor))
        if choice.output_counts and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = self._pairs(choice.output_counts.items())
            row.index_add_(0, ids, -(sampling.presence_penalty + sampling.frequency_penalty * counts))
        if choice.output_len < sampling.min_tokens:
            banned = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos)}
            if known := [token for token in banned if token < row.shape[0]]:
                row.index_fill_(0, self._ids(known), -torch.inf)


def _adjusts(choice: Choice) -> bool:
    """Whether `Sampler._adjust` may change this row."""
    sampling = choice.sampling
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or choice.output_len < sampling.min_tokens
    )
