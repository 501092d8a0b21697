"""Which token comes next: penalties, masks, filters, and a counter-based draw.

The random number for a token depends only on (request seed, position in the context). A request that
migrates, is preempted or is replayed therefore draws the same numbers, wherever it runs.

Every operation works on one row at a time, so a row's token does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from baton.engine.sequence import Sequence as Choice
from baton.sampling import PositionLogprobs, Sampling, TokenLogprob

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Sampled:
    """The token chosen for a row, with log-probabilities when they were asked for."""

    token_id: int
    logprobs: PositionLogprobs | None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), 53 bits, a pure function of its arguments.

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014) over seed and counter.
    """
    return (_mix(_mix(seed & _MASK64) + position * _GOLDEN) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class Sampler:
    """Chooses one token per row of logits.

    `eos_token_ids` are the model's; they count as stop tokens for min_tokens unless a request
    ignores them.
    """

    def __init__(self, eos_token_ids: Iterable[int]) -> None:
        self._eos = tuple(eos_token_ids)

    def sample(self, logits: torch.Tensor, choices: Sequence[Choice]) -> list[Sampled]:
        """One token per row.

        logits is [len(choices), vocab] float32 and is changed in place; row i belongs to choices[i]
        at its next position.
        """
        samplings = [choice.sampling for choice in choices]
        asked = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        raw = logits[asked].log_softmax(-1) if asked else None
        for row, choice in enumerate(choices):
            if _adjusts(choice):
                self._adjust(logits[row], choice)
        tokens = logits.argmax(-1)
        drawn = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
        if drawn:
            everything = len(drawn) == len(choices)
            chosen = _draw(
                logits if everything else logits[drawn],
                [samplings[row] for row in drawn],
                [uniform(samplings[row].seed, len(choices[row].tokens)) for row in drawn],
            )
            tokens = (
                chosen
                if everything
                else tokens.index_copy(0, torch.tensor(drawn, device=tokens.device), chosen)
            )
        ids: list[int] = tokens.tolist()
        logprobs: dict[int, PositionLogprobs] = {}
        if raw is not None:
            counts = [samplings[row].logprobs or 0 for row in asked]
            logprobs = dict(
                zip(asked, position_logprobs(raw, [ids[row] for row in asked], counts), strict=True)
            )
        return [Sampled(token, logprobs.get(row)) for row, token in enumerate(ids)]

    def _adjust(self, row: torch.Tensor, choice: Choice) -> None:
        """Apply bias, penalties and the min_tokens mask to one row [vocab], in place."""
        sampling = choice.sampling
        if sampling.logit_bias:
            ids, values = _pairs(sampling.logit_bias.items(), row)
            row.index_add_(0, ids, values)
        if sampling.repetition_penalty != 1.0:
            ids = torch.tensor(sorted(set(choice.tokens)), device=row.device)
            seen = row[ids]
            factor = sampling.repetition_penalty
            row[ids] = torch.where(seen > 0, seen / factor, seen * factor)
        if choice.output_counts and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = _pairs(choice.output_counts.items(), row)
            row.index_add_(0, ids, -(sampling.presence_penalty + sampling.frequency_penalty * counts))
        if choice.output_len < sampling.min_tokens:
            banned = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos)]
            row[[token for token in banned if token < row.shape[0]]] = -torch.inf


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


def position_logprobs(
    logprobs: torch.Tensor, chosen: Sequence[int], counts: Sequence[int]
) -> list[PositionLogprobs]:
    """The chosen token's log-probability and rank, and the `counts[i]` most likely tokens of row i.

    logprobs is [len(chosen), vocab] in nats.
    """
    ids = torch.tensor(chosen, device=logprobs.device)
    values = logprobs.gather(1, ids[:, None])
    ranks = (logprobs > values).sum(-1) + 1
    widest = max(counts)
    top_values, top_ids = logprobs.topk(widest, dim=-1) if widest else (values[:, :0], ids[:, None][:, :0])
    return [
        PositionLogprobs(
            TokenLogprob(token, value, rank),
            tuple(
                TokenLogprob(t, v, r)
                for r, (t, v) in enumerate(zip(row_ids[:count], row_values[:count], strict=True), 1)
            ),
        )
        for token, value, rank, row_ids, row_values, count in zip(
            chosen,
            values[:, 0].tolist(),
            ranks.tolist(),
            top_ids.tolist(),
            top_values.tolist(),
            counts,
            strict=True,
        )
    ]


def _pairs(items: Iterable[tuple[int, float]], row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, values = zip(*items, strict=True)
    return torch.tensor(ids, device=row.device), torch.tensor(values, dtype=row.dtype, device=row.device)


def _draw(logits: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> torch.Tensor:
    """One token per row by inverting the filtered distribution's cumulative sum in token order.

    logits is [rows, vocab]; returns int64 [rows]. Order of filters as in vLLM: temperature, min-p,
    top-k, top-p.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    probabilities = (logits.double() / column([s.temperature for s in samplings])).softmax(-1)
    if any(s.min_p > 0 for s in samplings):
        floor = probabilities.amax(-1, keepdim=True) * column([s.min_p for s in samplings])
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    vocab = logits.shape[-1]
    if any(0 < s.top_k < vocab or s.top_p < 1 for s in samplings):
        keep_count = column([s.top_k if 0 < s.top_k < vocab else vocab for s in samplings])
        keep_mass = column([s.top_p for s in samplings])
        descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(vocab, device=logits.device)
        descending = descending.masked_fill(rank >= keep_count, 0.0)
        before = descending.cumsum(-1) - descending
        descending = descending.masked_fill(before >= keep_mass * descending.sum(-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, descending)
    cumulative = probabilities.cumsum(-1)
    target = column(uniforms) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=vocab - 1)
