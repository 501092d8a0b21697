"""One engine step on the device: flatten the batch, run the model, sample."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from baton.attention.base import AttentionBackend, AttentionBatch
from baton.engine.sampler import Sampled, Sampler, position_logprobs
from baton.engine.scheduler import Scheduled
from baton.models.base import Model
from baton.sampling import PositionLogprobs


@dataclass(frozen=True)
class Result:
    """What a step brought one scheduled sequence.

    `sampled` is its next token, if the step completed its context. `prompt_logprobs` are those of
    the prompt tokens that this step's query tokens predict, when they were asked for.
    """

    sampled: Sampled | None
    prompt_logprobs: list[PositionLogprobs]


class Runner:
    """Runs batches of scheduled sequences through a model and its KV pool."""

    def __init__(self, model: Model, attention: AttentionBackend, device: torch.device) -> None:
        self._model = model
        self._attention = attention
        self._device = device
        self._sampler = Sampler(model.config.eos_token_ids)
        self._current: AbstractContextManager[object] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )

    @torch.inference_mode()
    def run(self, batch: Sequence[Scheduled]) -> list[Result]:
        """Compute one step. Results are in the order of `batch`."""
        with self._current:
            return self._run(batch)

    def _run(self, batch: Sequence[Scheduled]) -> list[Result]:
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for item in batch:
            sequence, start = item.sequence, item.sequence.computed
            end = start + item.query_len
            if sequence.wants_prompt_logprobs:
                wanted += range(len(tokens), len(tokens) + item.query_len)
            elif item.samples:
                wanted.append(len(tokens) + item.query_len - 1)
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
        self._attention.begin(
            AttentionBatch(
                query_lens=[item.query_len for item in batch],
                context_lens=[item.sequence.computed + item.query_len for item in batch],
                block_tables=[item.sequence.blocks for item in batch],
            )
        )
        hidden = self._model.forward(self._tensor(tokens), self._tensor(positions), self._attention)
        if not wanted:
            # Blocks are announced to readers on return, so what writes them must have finished.
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return [Result(None, []) for _ in batch]
        logits = self._model.logits(hidden[self._tensor(wanted)])
        return self._results(batch, logits)

    def _results(self, batch: Sequence[Scheduled], logits: torch.Tensor) -> list[Result]:
        """Split the rows of `logits` back over the batch; see `run` for which rows there are."""
        sampling_rows: list[int] = []
        prompt_logprobs: list[list[PositionLogprobs]] = []
        row = 0
        for item in batch:
            rows = item.query_len if item.sequence.wants_prompt_logprobs else int(item.samples)
            prompt_logprobs.append(_prompt_logprobs(item, logits[row : row + rows]))
            row += rows
            if item.samples:
                sampling_rows.append(row - 1)
        samplers = [item.sequence for item in batch if item.samples]
        if len(sampling_rows) != logits.shape[0]:
            logits = logits[self._tensor(sampling_rows)]
        sampled = iter(self._sampler.sample(logits, samplers) if samplers else [])
        return [
            Result(next(sampled) if item.samples else None, logprobs)
            for item, logprobs in zip(batch, prompt_logprobs, strict=True)
        ]

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _prompt_logprobs(item: Scheduled, logits: torch.Tensor) -> list[PositionLogprobs]:
    """Log-probabilities of the prompt tokens right after each query token; logits [query_len, vocab]."""
    sequence = item.sequence
    if not sequence.wants_prompt_logprobs:
        return []
    first = sequence.computed + 1
    following = sequence.tokens[first : min(first + item.query_len, sequence.prompt_len)]
    if not following:
        return []
    count = sequence.sampling.prompt_logprobs or 0
    return position_logprobs(logits[: len(following)].log_softmax(-1), following, [count] * len(following))
