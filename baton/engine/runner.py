"""One engine step on the device: flatten the batch, run the model, sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.attention.base import Attention
from baton.device import Download, device_of
from baton.engine.graphs import DecodeGraphs
from baton.engine.inputs import Inputs, predicts_prompt
from baton.engine.interfaces import Step
from baton.engine.logprobs import LogprobRows
from baton.engine.sampler import Sampled, SampledRows, Sampler
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
    """Runs batches of scheduled sequences through a model and its KV pool.

    With `graphs`, steps in which every sequence has one token run as graphs, as far as those reach.
    """

    def __init__(
        self,
        model: Model,
        attention: Attention,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.device = device_of(device)
        self.sampler = Sampler(model.config.eos_token_ids, self.device)
        self._model = model
        self._attention = attention
        self._graphs = graphs

    def begin(self, batch: Sequence[Scheduled]) -> Step:
        """Have the device compute a step; see `baton.engine.interfaces`."""
        return self.begin_after(None, batch)

    def run(self, batch: Sequence[Scheduled]) -> Sequence[Result]:
        """Compute one step and wait for it. Results are in the order of `batch`."""
        step = self.begin_after(None, batch)
        step.sample()
        return step.results()

    @torch.inference_mode()
    def begin_after(self, before: _RunningStep | None, batch: Sequence[Scheduled]) -> _RunningStep:
        """As `begin`, with tokens that `before` sampled and nobody has seen yet."""
        sampled = {} if before is None else {s: row for row, s in enumerate(before.samplers)}
        inputs = Inputs.of(batch, sampled)
        with self.device.current():
            tokens = self.ids(inputs.tokens)
            if before is not None and inputs.unseen:
                last = before.tokens.index_select(0, self.ids(inputs.unseen_rows))
                tokens.index_copy_(0, self.ids(inputs.unseen), last)
            return _RunningStep(self, batch, self._logits(inputs, tokens))

    def ids(self, values: Sequence[int]) -> torch.Tensor:
        """int64 on the device."""
        return self.device.tensor(values, torch.int64)

    def _logits(self, inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor | None:
        """float32 [wanted, vocab]; None where none are wanted."""
        positions = self.ids(inputs.positions)
        if self._graphs is not None and self._graphs.take(inputs.attention):
            logits = self._graphs.run(tokens, positions, inputs.attention)
            if len(inputs.wanted) == len(inputs.tokens):
                return logits
            return logits.index_select(0, self.ids(inputs.wanted)) if inputs.wanted else None
        self._attention.begin(inputs.attention)
        hidden = self._model.forward(tokens, positions, self._attention)
        if not inputs.wanted:
            return None
        return self._model.logits(hidden.index_select(0, self.ids(inputs.wanted)))


class _RunningStep(Step):
    """A step of a `Runner`. `tokens` are what it samples, one each for the sequences `samplers`."""

    tokens: torch.Tensor

    def __init__(self, runner: Runner, batch: Sequence[Scheduled], logits: torch.Tensor | None) -> None:
        self.samplers = [item.sequence for item in batch if item.samples]
        self._runner = runner
        self._batch = batch
        self._logits = logits
        self._sampled: SampledRows | None = None
        self._prompts: list[LogprobRows | None] = [None] * len(batch)
        self._download: Download | None = None

    @torch.inference_mode()
    def sample(self) -> None:
        device = self._runner.device
        with device.current():
            tensors: list[torch.Tensor] = []
            if self._logits is not None:
                if (rows := self._split(self._logits)) is not None:
                    self._sampled = self._runner.sampler.sample(rows, self.samplers)
                    self.tokens = self._sampled.tokens
                    tensors += self._sampled.tensors
                for prompt in self._prompts:
                    tensors += () if prompt is None else prompt.tensors
                self._logits = None
            # Also where there is nothing to fetch: blocks are announced to readers when the step has ended,
            # so what writes them must have finished.
            self._download = device.download(tensors)

    def then(self, batch: Sequence[Scheduled]) -> Step:
        return self._runner.begin_after(self, batch)

    def results(self) -> Sequence[Result]:
        if self._download is None:
            raise RuntimeError("results before sample")
        host = iter(self._download.wait())
        sampled: list[Sampled] = []
        if self._sampled is not None:
            sampled = self._sampled.read([next(host) for _ in self._sampled.tensors])
        prompts = [[] if p is None else p.read([next(host) for _ in p.tensors]) for p in self._prompts]
        tokens = iter(sampled)
        return [
            Result(next(tokens) if item.samples else None, prompt)
            for item, prompt in zip(self._batch, prompts, strict=True)
        ]

    def _split(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Deal the rows of `logits` out over the batch, and return those to sample from."""
        sampling_rows: list[int] = []
        row = 0
        for at, item in enumerate(self._batch):
            rows = item.query_len if predicts_prompt(item) else int(item.samples)
            if predicts_prompt(item):
                self._prompts[at] = self._prompt_logprobs(item, logits[row : row + rows])
            row += rows
            if item.samples:
                sampling_rows.append(row - 1)
        if len(sampling_rows) == logits.shape[0]:
            return logits
        return logits.index_select(0, self._runner.ids(sampling_rows)) if sampling_rows else None

    def _prompt_logprobs(self, item: Scheduled, logits: torch.Tensor) -> LogprobRows | None:
        """Log-probabilities of the prompt tokens right after each query token; logits [query_len, vocab]."""
        sequence, first = item.sequence, item.start + 1
        following = sequence.tokens[first : min(first + item.query_len, sequence.prompt_len)]
        if not following:
            return None
        count = sequence.sampling.prompt_logprobs or 0
        logprobs = logits[: len(following)].log_softmax(-1)
        return LogprobRows.of(logprobs, self._runner.ids(following), [count] * len(following))
